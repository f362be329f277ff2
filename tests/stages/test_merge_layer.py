"""One layer merged, and what is counted of it. Whole merges: test_merge.py, test_merge_in_parts.py."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from sqft_gptq.solver import round_to_nearest
from sqft_nls.adapter import Nls
from sqft_sparsepeft import QASparsePEFT, SparsePEFT
from torch import Tensor, nn

from sqft.api import BaseWeight, LinearShape, Merger, Quantized
from sqft.kernels.grids import dequantize, quantize, same
from sqft.modeling.adapters.adapted_linear import MergedLinear, adapt
from sqft.modeling.adapters.frozen_weight import FloatWeight, FrozenWeight, PackedWeight
from sqft.stages.merge_layer import codes_before_training, count_unlike, kept_by_base, merge_layer, report_of
from sqft.types import BaseKind


def sparse(out: int = 16, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with zeros, and what is kept."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(out, inputs, generator=generator) < 0.5
    return torch.randn(out, inputs, generator=generator) * kept, kept


class Fills(Merger):
    """A merger that keeps no zero."""

    name: ClassVar[str] = "fills"
    bases: ClassVar[frozenset[BaseKind]] = frozenset({BaseKind.SPARSE})

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        return base.weight + 1 + delta.abs()


def adapted(base: FrozenWeight, merger: Merger, size: float = 0.3) -> MergedLinear:
    delta = Nls(ranks=(3,), alpha=6.0).delta(LinearShape("l", 16, 64), torch.Generator().manual_seed(1))
    assert isinstance(delta, nn.Module)
    delta.B.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(size)  # type: ignore[union-attr, operator]
    layer = adapt(base, None, delta, merger)
    assert isinstance(layer, MergedLinear)
    return layer


def test_floats_have_an_effective_weight_and_no_codes() -> None:
    weight, kept = sparse()
    layer = adapted(FloatWeight(weight, True), SparsePEFT())
    merged = merge_layer(layer, None, "cpu")
    assert merged.codes is None and merged.weight.equal(layer.effective())
    assert not merged.weight[~kept].any() and not merged.weight.equal(weight)
    zeros = int((~kept).sum())
    assert merged.lost == 0
    assert merged.counts == {"zeros_before": zeros, "zeros_after": int((merged.weight == 0).sum()), "weights": 16 * 64}


def test_on_a_grid_the_effective_weight_is_what_its_codes_stand_for() -> None:
    weight, kept = sparse()
    grid = round_to_nearest(weight, kept, 4, 32, True, False).grid
    layer = adapted(FloatWeight(weight, True, grid), QASparsePEFT())
    merged = merge_layer(layer, None, "cpu")
    assert merged.codes is not None
    assert merged.weight.equal(dequantize(merged.codes)) and merged.weight.equal(layer.effective())


def test_what_a_merge_changes_is_counted() -> None:
    """Codes against those that training began with, and against the base's; zeros that a merger fills."""
    weight, kept = sparse()
    quantized = round_to_nearest(weight, kept, 4, 32, True, False)
    other = Quantized(quantized.codes.clone(), quantized.grid)
    other.codes[0, :7] ^= 1
    layer = adapted(PackedWeight(quantized, kept, torch.float32), QASparsePEFT(), size=0.0)
    counts = merge_layer(layer, other, "cpu").counts
    assert counts["codes_changed"] == 0 and counts["codes_unlike_base"] == 7
    filled = merge_layer(adapted(FloatWeight(weight, True), Fills()), None, "cpu")
    assert filled.lost == int((~kept).sum()) == filled.counts["zeros_before"] and filled.counts["zeros_after"] == 0
    report = report_of([counts, counts], 4)
    assert report["layers"] == 2 and report["codes_unlike_base"] == 14 and report["bits"] == 4
    assert report["sparsity"] == counts["zeros_after"] / counts["weights"]
    assert "bits" not in report_of([filled.counts])


def test_codes_that_training_did_not_change_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    counts = {"weights": 4, "zeros_before": 2, "zeros_after": 2, "codes_changed": 0, "codes_unlike_base": 3}
    with caplog.at_level("WARNING", "sqft"):
        assert "training changed no code" in report_of([counts, counts], 4)["warning"]
        assert "warning" not in report_of([counts, {**counts, "codes_changed": 1}], 4)
        assert "warning" not in report_of([counts])
    assert len(caplog.records) == 1


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
    layer = adapted(FloatWeight(weight, True, grid), QASparsePEFT())
    codes = layer.codes()
    assert count_unlike(layer, codes, "cpu") == 0
    codes.codes[3, 5:8] ^= 1
    assert count_unlike(layer, codes, "cpu") == 3
