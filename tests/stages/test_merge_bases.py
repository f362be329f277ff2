"""What a base keeps, and the codes that training began with. Whole merges: test_merge_in_parts.py."""

from __future__ import annotations

import torch
from sqft_gptq.solver import round_to_nearest
from sqft_nls.adapter import Nls
from sqft_sparsepeft import QASparsePEFT
from torch import Tensor

from sqft.api import LinearShape
from sqft.kernels.grids import quantize, same
from sqft.modeling.adapters.adapted_linear import MergedLinear, adapt
from sqft.modeling.adapters.frozen_weight import FloatWeight, PackedWeight
from sqft.stages.merge_bases import codes_before_training, count_unlike, kept_by_base


def sparse(out: int = 16, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with zeros, and what is kept."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(out, inputs, generator=generator) < 0.5
    return torch.randn(out, inputs, generator=generator) * kept, kept


def test_codes_before_training() -> None:
    """Of floats, rounded on their grid; of codes, themselves."""
    weight, kept = sparse()
    quantized = round_to_nearest(weight, kept, 4, 32, True, False)
    started = codes_before_training(FloatWeight(weight, True, quantized.grid))
    assert started.codes.equal(quantize(weight, quantized.grid))
    assert same(codes_before_training(PackedWeight(quantized, None, torch.float32)), quantized)


def test_what_a_base_keeps() -> None:
    """A kept weight may be rounded to zero: codes without a mask keep everything."""
    weight, kept = sparse()
    quantized = round_to_nearest(weight, kept, 4, 32, True, False)
    assert kept_by_base(FloatWeight(weight, True)).equal(kept)
    assert kept_by_base(FloatWeight(weight, False)).equal(kept)
    assert kept_by_base(PackedWeight(quantized, kept, torch.float32)).equal(kept)
    assert kept_by_base(PackedWeight(quantized, None, torch.float32)).all()


def test_codes_that_come_out_otherwise_are_counted() -> None:
    """What a merge reports of a device other than the CPU, here of the CPU itself."""
    weight, kept = sparse()
    grid = round_to_nearest(weight, kept, 4, 32, True, False).grid
    delta = Nls(ranks=(3,), alpha=6.0).delta(LinearShape("l", 16, 64), torch.Generator().manual_seed(1))
    layer = adapt(FloatWeight(weight, True, grid), None, delta, QASparsePEFT())
    assert isinstance(layer, MergedLinear)
    codes = layer.codes()
    assert count_unlike(layer, codes, "cpu") == 0
    codes.codes[3, 5:8] ^= 1
    assert count_unlike(layer, codes, "cpu") == 3
