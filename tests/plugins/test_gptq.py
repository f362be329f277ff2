"""GPTQ against float64 oracles that solve, column by column, what it only updates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from sqft_gptq import Gptq, Rtn
from sqft_gptq import solver as module
from sqft_least_squares import LeastSquares
from sqft_sparsegpt import SparseGpt
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.api import Component, LinearShape, LinearStats, Quantized, StageError
from sqft.kernels import grids
from sqft.kernels.grids import dequantize, fit_grid

OUT, IN, TOKENS = 6, 64, 256


def problem(seed: int, inputs: int = IN, pruned: float = 0.0) -> tuple[Tensor, Tensor | None, LinearStats]:
    """A weight, its mask, and the Hessian of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(OUT, inputs, generator=g)
    mixing = torch.eye(inputs) + 0.05 * torch.randn(inputs, inputs, generator=g)
    x = torch.randn(TOKENS, inputs, generator=g) @ mixing
    mask = torch.rand(OUT, inputs, generator=g) >= pruned if pruned else None
    return (weight if mask is None else weight * mask), mask, LinearStats(TOKENS, hessian=x.T @ x)


def damped(stats: LinearStats, damp: float) -> Tensor:
    assert stats.hessian is not None
    H = stats.hessian.double()
    return H + damp * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)


def error(weight: Tensor, value: Tensor, stats: LinearStats) -> float:
    """‖W X − Ŵ X‖²."""
    assert stats.hessian is not None
    difference = (weight - value).double()
    return float((difference @ stats.hessian.double() * difference).sum())


def exact(
    weight: Tensor, mask: Tensor | None, H: Tensor, order: list[int], bits: int, size: int
) -> tuple[Tensor, Tensor]:
    """Quantize a column, then solve the least squares of those to come over each row's kept weights, exactly.

    float64; with nothing pruned it is what GPTQ's updates stand for. Returns the values, and the floats before they
    were rounded.
    """
    W0, top = weight.double(), 2**bits - 1
    result, compensated = torch.zeros_like(W0), torch.zeros_like(W0)
    for row in range(len(W0)):
        W = W0[row].clone()
        kept = [j for j in order if mask is None or mask[row, j]]
        done: list[int] = []
        for place, j in enumerate(order):
            if place % size == 0:
                scale, zero = fit_grid(W[order[place : place + size]].float()[None], bits, False)
            s, z = scale.double().item(), zero.item()
            result[row, j] = s * (min(max(round(W[j].item() / s) + z, 0), top) - z) if j in kept else 0.0
            if j not in kept:
                continue
            done.append(j)
            compensated[row, j] = W[j]
            if rest := [k for k in kept if k not in done]:
                fixed = W0[row, done] - result[row, done]
                W[rest] = W0[row, rest] + torch.linalg.solve(H[rest][:, rest], H[rest][:, done] @ fixed)
    return result, compensated


def remasked(weight: Tensor, mask: Tensor, H: Tensor, bits: int, size: int) -> Tensor:
    """The same rule as ours, update and mask again, in plain float64 loops."""
    W, top = weight.double().clone(), 2**bits - 1
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    result = torch.zeros_like(W)
    for row in range(len(W)):
        for j in range(W.shape[1]):
            if j % size == 0:
                scale, zero = fit_grid(W[row, j : j + size].float()[None], bits, False)
            s, z = scale.double().item(), zero.item()
            result[row, j] = s * (min(max(round(W[row, j].item() / s) + z, 0), top) - z)
            wrong = (W[row, j] - result[row, j]) / U[j, j]
            for k in range(j, W.shape[1]):
                W[row, k] = (W[row, k] - wrong * U[j, k]) if mask[row, k] else 0.0
    return result


@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("how", ["as they stand", "act_order", "reorder_groups"])
@pytest.mark.parametrize("bits", [3, 4])
def test_with_nothing_pruned_it_solves_the_least_squares(bits: int, how: str, size: int) -> None:
    weight, _, stats = problem(1)
    assert stats.hessian is not None
    options = {"act_order": how == "act_order", "reorder_groups": how == "reorder_groups"}
    result = Gptq(bits=bits, group_size=size, symmetric=False, **options).quantize(weight, None, stats)
    found, strength = dequantize(result), stats.hessian.diagonal().tolist()
    order = [*range(IN)]
    if how == "act_order":
        order.sort(key=lambda j: -strength[j])
    elif how == "reorder_groups" and size != -1:
        groups = [order[start : start + size] for start in range(0, IN, size)]
        groups.sort(key=lambda group: -max(strength[j] for j in group))
        order = [j for group in groups for j in sorted(group, key=lambda j: -strength[j])]
        assert order != [*range(IN)] and result.grid.group_index is None
    expected, before = exact(weight, None, damped(stats, 0.01), order, bits, IN if size == -1 else size)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    assert result.compensated is not None
    torch.testing.assert_close(result.compensated.double(), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("options", [{}, {"act_order": True}, {"reorder_groups": False}, {"static_groups": True}])
def test_the_compensated_floats_round_to_the_codes(options: dict[str, Any], size: int, monkeypatch: Any) -> None:
    """In any order, over several blocks; where weights are pruned they are 0, and elsewhere not the weight itself."""
    monkeypatch.setattr(module, "BLOCK", 64)
    weight, mask, stats = problem(9, inputs=192, pruned=0.5)
    result = Gptq(group_size=size, symmetric=False, clip=True, **options).quantize(weight, mask, stats)
    assert result.compensated is not None and mask is not None
    assert grids.quantize(result.compensated, result.grid).equal(result.codes)
    assert not result.compensated[~mask].any() and (result.compensated != weight)[mask].float().mean() > 0.9


@pytest.mark.parametrize("size", [-1, 64])
@pytest.mark.parametrize("options", [{}, {"static_groups": True}, {"symmetric": False, "clip": True}])
@pytest.mark.parametrize("pruned", [0.0, 0.5])
def test_one_group_is_not_reordered(size: int, options: dict[str, Any], pruned: float) -> None:
    """All inputs in one group, by -1 or by their number: codes and grid are those of the inputs as they stand."""
    weight, mask, stats = problem(4, pruned=pruned)
    reordered, plain = (
        Gptq(group_size=size, reorder_groups=reorder, **options).quantize(weight, mask, stats)  # type: ignore[arg-type]
        for reorder in (True, False)
    )
    assert grids.same(reordered, plain)


@pytest.mark.parametrize("pruned", [0.0, 0.5])
def test_codes_are_not_those_of_rounding_to_nearest(pruned: float) -> None:
    """Where inputs are correlated, a quarter of the codes and more: a quantizer that silently rounds has none."""
    weight, mask, stats = problem(4, pruned=pruned)
    found, nearest = (kind(group_size=32).quantize(weight, mask, stats) for kind in (Gptq, Rtn))
    changed = found.codes != nearest.codes
    assert (changed if mask is None else changed[mask]).float().mean() > 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_row_wider_than_a_block_is_one_group(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """576 inputs in blocks of 128 are quantized as in one block, on the grid of the row as a whole."""
    weight, mask, stats = problem(6, inputs=576, pruned=0.5)
    quantizer = Gptq(group_size=-1, symmetric=symmetric)
    found = quantizer.quantize(weight, mask, stats)
    monkeypatch.setattr(module, "BLOCK", 576)
    whole = quantizer.quantize(weight, mask, stats)
    assert mask is not None
    scale, zero = fit_grid(weight * mask, 4, symmetric)
    assert found.grid.scale.flatten().equal(scale.flatten().half()) and found.grid.zero.flatten().equal(zero.flatten())
    assert found.grid.scale.equal(whole.grid.scale) and found.grid.zero.equal(whole.grid.zero)
    assert (found.codes != whole.codes).float().mean() < 0.01  # ties fall either way


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("size", [32, -1])
@pytest.mark.parametrize("quantizer", [Gptq, Rtn])
def test_weights_of_one_sign_on_an_asymmetric_grid(quantizer: type[Any], size: int, sign: int) -> None:
    """Zero is on the grid although no weight is near it: codes and zero points stay within 4 bits."""
    weight, mask, stats = problem(8, pruned=0.5)
    assert mask is not None
    weight = sign * (weight.abs() + 1) * mask
    result = quantizer(group_size=size, symmetric=False).quantize(weight, mask, stats)
    assert int(result.codes.max()) <= 15 and int(result.grid.zero.min()) >= 0 and int(result.grid.zero.max()) <= 15
    found = dequantize(result)
    assert not found[~mask].any() and result.grid.scale.isfinite().all()
    assert (found[mask].sign() == sign).all()


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 500), st.sampled_from([0.3, 0.5, 0.9]), st.sampled_from([32, -1]))
def test_with_a_mask_it_is_update_and_mask_again(seed: int, pruned: float, size: int) -> None:
    weight, mask, stats = problem(seed, pruned=pruned)
    assert mask is not None
    plain = Gptq(group_size=size, symmetric=False, reorder_groups=False)
    found = dequantize(plain.quantize(weight, mask, stats))
    expected = remasked(weight, mask, damped(stats, 0.01), 4, IN if size == -1 else size)
    assert not found[~mask].any()
    # A code may differ where float32 and float64 fall on two sides of a tie; what follows then differs too.
    rows = ((found.double() - expected).abs() < 1e-5).all(1)
    assert rows.float().mean() >= 0.5
    assert error(weight, found, stats) == pytest.approx(error(weight, expected.float(), stats), rel=0.02)


def test_the_gap_to_each_rows_exact_optimum_is_small() -> None:
    """Reported in docs/results: what masking the shared update costs against solving every row by itself."""
    weight, mask, stats = problem(7, pruned=0.5)
    assert mask is not None
    plain = Gptq(group_size=32, symmetric=False, reorder_groups=False)
    ours = error(weight, dequantize(plain.quantize(weight, mask, stats)), stats)
    best = error(weight, exact(weight, mask, damped(stats, 0.01), [*range(IN)], 4, 32)[0].float(), stats)
    nearest = error(weight, dequantize(Rtn(group_size=32, symmetric=False).quantize(weight, mask, stats)), stats)
    assert best <= ours < nearest


@pytest.mark.parametrize("pruned", [0.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"symmetric": False}, {"act_order": True}, {"clip": True}, {"bits": 2}])
def test_it_beats_rounding_to_nearest(options: dict[str, object], pruned: float) -> None:
    weight, mask, stats = problem(3, pruned=pruned)
    nearest = {key: value for key, value in options.items() if key != "act_order"}
    ours = error(weight, dequantize(Gptq(group_size=32, **options).quantize(weight, mask, stats)), stats)  # type: ignore[arg-type]
    theirs = error(weight, dequantize(Rtn(group_size=32, **nearest).quantize(weight, mask, stats)), stats)  # type: ignore[arg-type]
    assert ours < theirs


def test_lazy_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, mask, stats = problem(5, inputs=256, pruned=0.5)
    quantizer = Gptq(group_size=32)
    lazy = quantizer.quantize(weight, mask, stats)
    monkeypatch.setattr(module, "BLOCK", 256)
    whole = quantizer.quantize(weight, mask, stats)
    assert (lazy.codes != whole.codes).float().mean() < 0.01  # ties fall either way


def test_act_order_with_static_groups_keeps_contiguous_groups() -> None:
    weight, mask, stats = problem(9, pruned=0.5)
    moved = Gptq(group_size=32, act_order=True).quantize(weight, mask, stats)
    static = Gptq(group_size=32, act_order=True, static_groups=True).quantize(weight, mask, stats)
    assert moved.grid.group_index is not None and moved.grid.group_index.bincount().tolist() == [32, 32]
    assert static.grid.group_index is None
    assert static.grid.scale.equal(Rtn(group_size=32).quantize(weight, mask, stats).grid.scale)
    assert mask is not None and not dequantize(static)[~mask].any() and not dequantize(moved)[~mask].any()


@pytest.mark.parametrize("symmetric", [True, False])
def test_static_groups_in_any_order_stand_where_they_were(symmetric: bool) -> None:
    """Groups are reordered unless told otherwise, and grids fitted beforehand are in order already."""
    weight, mask, stats = problem(9, inputs=128, pruned=0.5)
    options = {"group_size": 32, "bits": 3, "symmetric": symmetric}
    nearest = Rtn(**options).quantize(weight, mask, stats)  # type: ignore[arg-type]
    static = Gptq(static_groups=True, **options).quantize(weight, mask, stats)  # type: ignore[arg-type]
    assert static.grid.scale.equal(nearest.grid.scale) and static.grid.zero.equal(nearest.grid.zero)
    assert mask is not None and not dequantize(static)[~mask].any()
    assert error(weight, dequantize(static), stats) < error(weight, dequantize(nearest), stats)


def test_dead_and_dependent_inputs() -> None:
    weight, _, stats = problem(11)
    assert stats.hessian is not None
    H = stats.hessian.clone()
    H[:, 5] = H[5] = 0  # an input that was always zero
    H[:, 7], H[7] = H[:, 6], H[6]  # and two that were always the same
    H[7, 7] = H[6, 6]
    found = dequantize(Gptq(group_size=32, damp=1e-8).quantize(weight, None, LinearStats(TOKENS, hessian=H)))
    assert found.isfinite().all()
    (scale, _) = fit_grid(weight[:, :32], 4, False)
    assert ((found[:, 5] - weight[:, 5]).abs() <= scale).all()  # rounded by itself, and not made zero


def test_a_hessian_that_is_none() -> None:
    weight, _, stats = problem(2)
    assert stats.hessian is not None
    with pytest.raises(StageError, match="finite Hessian"):
        Gptq(group_size=32).quantize(weight, None, LinearStats(TOKENS, hessian=stats.hessian * float("nan")))
    with pytest.raises(StageError, match="not positive definite"):
        Gptq(group_size=32).quantize(weight, None, LinearStats(TOKENS, hessian=-stats.hessian * 1e6))


def test_sizes_that_do_not_fit() -> None:
    said = Gptq(group_size=128).incompatibility(LinearShape("l", 576, 576))
    assert (
        said is not None and "576 inputs are not a multiple of group_size 128" in said and said.endswith("64, 32, -1")
    )
    assert Gptq(group_size=64).incompatibility(LinearShape("l", 576, 576)) is None


def test_codes_that_stand_for_more_than_float16_holds(raw: dict[str, Any], tmp_path: Path) -> None:
    class Far(Rtn):
        name = "far"
        gives_compensated = False

        def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
            result = super().quantize(weight, mask, stats)
            grid = replace(result.grid, scale=torch.full_like(result.grid.scale, 6e4))
            return replace(result, grid=grid, compensated=None)

    registry = Registry.discover()
    registry.add(Far)
    kept = {key: raw[key] for key in ("schema", "name", "model")}
    kept["model"] |= {"dtype": "float16"}
    kept["quantize"] = {"quantizer": {"name": "far", "options": {"group_size": 32}}}
    orchestrator = Orchestrator(registry, tmp_path)
    with pytest.raises(StageError, match=r"quantizer 'far' .*q_proj \d+ weights that float16, the model's precision"):
        orchestrator.run(orchestrator.plan(Recipe.parse(kept)))


@pytest.mark.parametrize(
    ("component", "options"),
    [
        (Gptq, {"damp": 1e7}),
        (Gptq, {"refine": 1, "refine_damp": 1e7}),
        (SparseGpt, {"damp": 1e7}),
        (LeastSquares, {"damping": 1e7}),
    ],
)
def test_a_damping_that_float32_may_not_hold_is_refused(component: type[Component], options: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1000000"):
        component.model_validate(options)
