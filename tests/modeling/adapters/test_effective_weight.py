"""The law has one caller of `combine`, whose blocks are what forward, backward and merge take."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from sqft_sparsepeft import SparsePEFT
from torch import Tensor, nn

import sqft
from sqft.errors import StageError
from sqft.kernels.grids import fit_grid
from sqft.modeling.adapters import frozen_weight
from sqft.modeling.adapters.effective_weight import (
    EffectiveLinear,
    EffectiveWeight,
    Factors,
    combine_rows,
    effective_codes,
    effective_weight,
    iter_row_blocks,
    outside_autograd,
)
from sqft.modeling.adapters.frozen_weight import FloatWeight
from sqft.types import BaseWeight, Grid

OWN = {"components/kinds.py", "testing.py"}
"""`Merger.derivative` differentiates its own `combine`, and the contract suite tries a merger out."""


def test_combine_is_called_in_one_place() -> None:
    root, callers = Path(sqft.__file__).parent, []
    for file in sorted(root.rglob("*.py")):
        for function in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(function, ast.FunctionDef):
                called = [n.func for n in ast.walk(function) if isinstance(n, ast.Call)]
                if any(isinstance(f, ast.Attribute) and f.attr == "combine" for f in called):
                    callers.append((str(file.relative_to(root)), function.name))
    assert [caller for caller in callers if caller[0] not in OWN] == [
        ("modeling/adapters/effective_weight.py", "combine_rows")
    ]


@pytest.fixture
def factors() -> Factors:
    generator = torch.Generator().manual_seed(0)
    return Factors(torch.randn(7, 3, generator=generator), torch.randn(3, 6, generator=generator), 0.5)


@pytest.fixture
def base() -> FloatWeight:
    weight = torch.randn(7, 6, generator=torch.Generator().manual_seed(1))
    weight[weight.abs() < 0.5] = 0
    return FloatWeight(weight, True)


def on_grid(base: FloatWeight) -> FloatWeight:
    scale, zero = fit_grid(base.dense().reshape(7, 2, 3), 4, False)
    return FloatWeight(base.dense(), True, Grid(scale, zero, 3, 4))


class Spy(SparsePEFT):
    """Remembers in which grad mode it is called."""

    name = "spy"

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        assert base.weight.dtype == delta.dtype == torch.float32
        return super().combine(base, delta)


def test_a_block_holds_what_was_combined(base: FloatWeight, factors: Factors, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frozen_weight, "BLOCK", 18)  # three rows at a time
    B, A, scale, _ = factors
    with outside_autograd(B.device):
        blocks = list(iter_row_blocks(SparsePEFT(), base, factors))
    assert [block.rows for block in blocks] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    for block in blocks:
        assert block.base.weight.equal(base.dense()[block.rows]) and block.grid is None
        torch.testing.assert_close(block.delta, scale * B[block.rows] @ A)
        assert block.base.mask is not None and block.merged.equal(block.base.weight + block.delta * block.base.mask)
    assert torch.cat([block.merged for block in blocks]).equal(effective_weight(SparsePEFT(), base, factors))


def test_blocks_are_made_outside_of_autograd_only(base: FloatWeight, factors: Factors) -> None:
    """In the caller's grad mode: what the caller does between two blocks is its own."""
    with pytest.raises(AssertionError, match="outside_autograd"):
        next(iter_row_blocks(SparsePEFT(), base, factors))
    with outside_autograd(factors.B.device):
        blocks = iter_row_blocks(SparsePEFT(), base, factors)
        next(blocks)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("autocast", [False, True])
def test_float32_whatever_surrounds_it(base: FloatWeight, factors: Factors, autocast: bool) -> None:
    """Forward, backward, merge and codes, inside autocast and with gradients on."""
    B, A = nn.Parameter(factors.B), nn.Parameter(factors.A)
    x, quantized = torch.randn(4, 6, requires_grad=True), on_grid(base)
    expected = effective_weight(SparsePEFT(), quantized, factors)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = EffectiveLinear.apply(x, None, B, A, None, 0.5, Spy(), quantized, False)  # type: ignore[no-untyped-call]
        weight = EffectiveWeight.apply(B, A, None, 0.5, Spy(), quantized)  # type: ignore[no-untyped-call]
        y.sum().backward()
        weight.sum().backward()
        codes = effective_codes(Spy(), quantized, factors)
    assert weight.equal(expected) and y.equal(x @ expected.T) and x.grad is not None
    assert codes.codes.dtype == torch.uint8 and not codes.grid.scale.requires_grad


@pytest.mark.parametrize("delta_only", [False, True])
def test_the_input_s_gradient_comes_from_the_same_weight(base: FloatWeight, factors: Factors, delta_only: bool) -> None:
    B, A = nn.Parameter(factors.B), nn.Parameter(factors.A)
    x, grad = torch.randn(4, 6, requires_grad=True), torch.randn(4, 7)
    y = EffectiveLinear.apply(x, None, B, A, None, 0.5, SparsePEFT(), base, delta_only)  # type: ignore[no-untyped-call]
    y.backward(grad)
    weight = effective_weight(SparsePEFT(), base, factors, delta_only)
    assert x.grad is not None and x.grad.equal(grad @ weight)
    with_x = B.grad, A.grad
    B.grad = A.grad = None
    y = EffectiveLinear.apply(x.detach(), None, B, A, None, 0.5, SparsePEFT(), base, delta_only)  # type: ignore[no-untyped-call]
    y.backward(grad)  # the weight itself is not wanted then
    assert all(one is not None and one.equal(other) for one, other in zip((B.grad, A.grad), with_x, strict=True))


def test_a_multiplier_scales_the_grid_of_its_rows(base: FloatWeight, factors: Factors) -> None:
    quantized, multiplier = on_grid(base), torch.full((7, 2), 1.5)
    block = combine_rows(SparsePEFT(), quantized, slice(2, 4), torch.zeros(2, 6), multiplier)
    assert block.grid is not None and quantized.scale is not None
    torch.testing.assert_close(block.grid.scale.float(), 1.5 * quantized.scale[2:4].float(), rtol=1e-3, atol=0)


def test_floats_have_no_codes(base: FloatWeight, factors: Factors) -> None:
    with pytest.raises(StageError, match="have no codes"):
        effective_codes(SparsePEFT(), base, factors)
