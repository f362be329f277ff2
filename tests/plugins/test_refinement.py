"""Coordinate descent on the grid against plain float64 loops, closed forms and all codes of tiny layers."""

from __future__ import annotations

from itertools import product
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_gptq import Gptq
from sqft_gptq import refinement as module
from sqft_gptq.refinement import refine, shrunk
from torch import Tensor

from sqft.api import Grid, LinearStats, Quantized
from sqft.kernels import grids
from sqft.kernels.grids import dequantize, expand_per_input, quantize
from sqft.testing import check

OUT, IN, TOKENS = 6, 64, 256


def problem(seed: int, inputs: int = IN, pruned: float = 0.5) -> tuple[Tensor, Tensor, Tensor]:
    """A dense weight [out, in], a mask, and the Hessian of correlated inputs [in, in]."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.randn(OUT, inputs, generator=g)
    mixing = torch.eye(inputs) + (2 / inputs**0.5) * torch.randn(inputs, inputs, generator=g)
    x = torch.randn(TOKENS, inputs, generator=g) @ mixing
    return dense, torch.rand(OUT, inputs, generator=g) >= pruned, x.T @ x


def error(target: Tensor, value: Quantized, H: Tensor) -> Tensor:
    """The squared output error of each row [out], in float64."""
    difference = (target - dequantize(value)).double()
    return (difference @ H.double() * difference).sum(1)


def plainly(start: Quantized, T: Tensor, H: Tensor, mask: Tensor, order: list[int], passes: int) -> Tensor:
    """The same descent in float64, one code after the other: each takes the code whose error is smallest of all."""
    scale, zero = (part.double() for part in expand_per_input(start.grid, T.shape[1]))
    codes, H, T = start.codes.double(), H.double(), T.double()
    for _, row, j in product(range(passes), range(len(T)), order):
        if not mask[row, j]:
            continue
        tried = codes[row].repeat(2**start.grid.bits, 1)
        tried[:, j] = torch.arange(2**start.grid.bits)
        difference = T[row] - scale[row] * (tried - zero[row])
        codes[row] = tried[(difference @ H * difference).sum(1).argmin()]
    return codes


options = st.fixed_dictionaries(
    {
        "bits": st.sampled_from([2, 3, 4, 8]),
        "group_size": st.sampled_from([32, -1]),
        "symmetric": st.booleans(),
        "clip": st.booleans(),
        "act_order": st.booleans(),
        "static_groups": st.booleans(),
        "reorder_groups": st.booleans(),
    }
)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 500), st.sampled_from([0.0, 0.5, 0.9]), options, st.integers(1, 3), st.sampled_from([0.0, 0.3]))
def test_the_error_falls_with_every_pass(
    seed: int, pruned: float, how: dict[str, Any], passes: int, damp: float
) -> None:
    """Of every row, on the grid that GPTQ chose; pruned weights stay zero."""
    dense, mask, H = problem(seed, pruned=pruned)
    weight, stats = dense * mask, LinearStats(TOKENS, hessian=H)
    quantizers = Gptq(**how), *(Gptq(**how, refine=n, refine_damp=damp) for n in range(1, passes + 1))
    before, after = (quantizer.quantize(weight, mask, stats) for quantizer in quantizers[-2:])
    H = shrunk(H, damp)
    assert (error(weight, after, H) <= error(weight, before, H) * (1 + 1e-5)).all()
    assert after.grid.scale.equal(before.grid.scale) and after.grid.zero.equal(before.grid.zero)
    assert not dequantize(after)[~mask].any()
    assert after.compensated is not None and not after.compensated[~mask].any()
    assert quantize(after.compensated, after.grid).equal(after.codes)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 500), st.booleans(), st.booleans())
def test_it_is_the_best_code_of_one_input_after_the_other(seed: int, symmetric: bool, to_dense: bool) -> None:
    dense, mask, H = problem(seed, inputs=32)
    weight, H = dense * mask, shrunk(H, 0.1)
    start = Gptq(bits=3, group_size=32, symmetric=symmetric).quantize(weight, mask, LinearStats(TOKENS, hessian=H))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(seed))
    target = dense if to_dense else weight
    found = refine(start, target, H, mask, order, 2)
    expected = plainly(start, target, H, mask, order.tolist(), 2)
    # A tie may fall either way in float32 and float64; what follows in that row then differs too.
    assert (found.codes == expected).all(1).float().mean() > 0.6


@pytest.mark.parametrize("pruned", [0.0, 0.5])
@pytest.mark.parametrize("symmetric", [True, False])
def test_it_comes_nearer_to_the_best_of_all_codes(pruned: float, symmetric: bool) -> None:
    """All codes of 4 bits for 4 kept inputs of each row are tried."""
    plain = Gptq(group_size=-1, symmetric=symmetric)
    gaps = {plain: 0.0, (refined := plain.model_copy(update={"refine": 5, "refine_damp": 0.0})): 0.0}
    for seed in range(5):
        dense, mask, H = problem(seed, inputs=4 if pruned == 0.0 else 6)
        mask = torch.ones_like(mask) if pruned == 0.0 else torch.rand(mask.shape).argsort(1) < 4
        weight, tried = dense * mask, torch.tensor(list(product(range(16), repeat=4)), dtype=torch.float64)
        for quantizer in gaps:
            found = quantizer.quantize(weight, mask, LinearStats(TOKENS, hessian=H))
            scale, zero = (part.double() for part in expand_per_input(found.grid, weight.shape[1]))
            for row, mine in enumerate(error(weight, found, H)):
                kept = mask[row].nonzero().flatten()
                difference = weight[row, kept] - scale[row, kept] * (tried - zero[row, kept])
                best = (difference @ H.double()[kept][:, kept] * difference).sum(1).min()
                assert mine >= best * (1 - 1e-6)
                gaps[quantizer] += float(mine / best)
    assert gaps[refined] < gaps[plain]


def test_many_passes_end_where_no_single_code_can_be_better() -> None:
    dense, mask, H = problem(3)
    weight = dense * mask
    found = Gptq(group_size=32, refine=20, refine_damp=0).quantize(weight, mask, LinearStats(TOKENS, hessian=H))
    again = refine(found, weight, H, mask, torch.arange(IN), 1)
    assert grids.same(found, again) and found.compensated is not None
    lowest = dequantize(found) + (weight - dequantize(found)) @ H / H.diagonal()  # of the parabola of each code alone
    torch.testing.assert_close(found.compensated, lowest * mask, rtol=1e-3, atol=1e-4)
    smallest, top = error(weight, found, H), 2**found.grid.bits - 1
    for j, step in product(range(IN), (-1, 1)):
        codes = found.codes.int()
        codes[:, j] = (codes[:, j] + step * mask[:, j]).clamp(0, top)
        assert (error(weight, Quantized(codes, found.grid), H) >= smallest * (1 - 1e-6)).all()


@pytest.mark.parametrize("how", ["inputs without correlation", "a damping that leaves none"])
def test_where_nothing_correlates_it_rounds_to_nearest(how: str) -> None:
    """Whatever codes it starts from, and for the target's weights where they are kept."""
    dense, mask, H = problem(4)
    H = torch.diag(H.diagonal()) if how == "inputs without correlation" else shrunk(H, 1e9)
    grid = Gptq(group_size=32).quantize(dense * mask, mask, LinearStats(TOKENS, hessian=H)).grid
    zero = expand_per_input(grid, IN)[1].to(torch.uint8)
    found = refine(Quantized(zero, grid), dense, H, mask, torch.arange(IN), 1)
    assert found.codes.equal(torch.where(mask, quantize(dense, grid), zero))


def test_codes_make_up_for_pruned_weights() -> None:
    """With the dense weight as the target, the output is nearer to the dense layer's, farther from the sparse one's."""
    dense, mask, H = problem(5)
    stats = LinearStats(TOKENS, hessian=H, dense=dense)
    targets: tuple[Literal["sparse"], Literal["dense"]] = ("sparse", "dense")
    to_sparse, to_dense = (
        Gptq(group_size=32, refine=5, target=target).quantize(dense * mask, mask, stats) for target in targets
    )
    assert error(dense, to_dense, H).sum() < 0.9 * error(dense, to_sparse, H).sum()
    assert error(dense * mask, to_dense, H).sum() > error(dense * mask, to_sparse, H).sum()
    assert not dequantize(to_dense)[~mask].any()


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, mask, H = problem(6, inputs=160)
    quantizer, stats = Gptq(group_size=32, act_order=True, refine=2), LinearStats(TOKENS, hessian=H)
    inputs_in_blocks = quantizer.quantize(dense * mask, mask, stats)  # 128 and 32
    monkeypatch.setattr(module, "BLOCK", 160)
    at_once = quantizer.quantize(dense * mask, mask, stats)
    assert (inputs_in_blocks.codes != at_once.codes).float().mean() < 0.01  # ties fall either way


def test_an_input_that_was_always_zero_is_rounded_by_itself() -> None:
    dense, _, H = problem(7, pruned=0.0)
    H[:, 5] = H[5] = 0
    found = Gptq(group_size=32, refine=2).quantize(dense, None, LinearStats(TOKENS, hessian=H))
    assert found.codes[:, 5].equal(quantize(dense, Grid(found.grid.scale, found.grid.zero, 32, 4))[:, 5])


@pytest.mark.parametrize("target", ["sparse", "dense"])
def test_it_keeps_the_contract(target: Literal["sparse", "dense"]) -> None:
    check(Gptq(refine=2, target=target))


@pytest.mark.parametrize("options", [{"refine_damp": 0.3}, {"target": "dense"}, {"refine": 0, "target": "dense"}])
def test_its_options_without_it(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"(refine_damp|target) has no effect without refine; remove it, or set"):
        Gptq(**options)
