"""The core's checks pass what fits, and name the component and the layer of what does not."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from sqft_nls.delta import LowRankDelta
from torch import Tensor

from sqft.components import checks
from sqft.errors import ContractError
from sqft.ranks import RankConfig, RankGroup, SearchSpace
from sqft.types import BaseWeight, Grid, LinearShape, Quantized

WHO = "scorer 'mine' (mine 0.1.0)"
PLACE = "layers.0.q_proj"
A, B = LinearShape("a", 4, 3), LinearShape("b", 2, 5)
GROUP_A, GROUP_B = RankGroup("ga", (4, 2), ("a",)), RankGroup("gb", (3,), ("b",))
SPACE = SearchSpace((GROUP_A, GROUP_B))
NAN, INF = float("nan"), float("inf")


def assert_rejected(message: str, check: Callable[..., None], *arguments: Any) -> None:
    """The check raises a ContractError that begins with the component's label and has the message in it."""
    with pytest.raises(ContractError) as caught:
        check(WHO, *arguments)
    assert str(caught.value).startswith(WHO)
    assert message in str(caught.value)


def test_no_torch_at_the_top() -> None:
    code = "import sys, sqft.components.checks, sqft.testing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_that_fit(dtype: torch.dtype) -> None:
    checks.check_scores(WHO, PLACE, torch.rand(4, 3), torch.rand(4, 3).to(dtype))


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (torch.rand(3, 4), f"scores of shape [3, 4] for {PLACE}, expected [4, 3]"),
        (torch.rand(12), f"scores of shape [12] for {PLACE}, expected [4, 3]"),
        (torch.full((4, 3), INF), f"scores with values that are not finite for {PLACE}"),
        (torch.full((4, 3), NAN), f"scores with values that are not finite for {PLACE}"),
        (torch.ones(4, 3, dtype=torch.int64), f"scores of torch.int64 for {PLACE}, expected a floating type"),
        (torch.ones(4, 3, dtype=torch.complex64), f"scores of torch.complex64 for {PLACE}, expected a floating type"),
        (torch.ones(4, 3, device="meta"), f"scores on meta for {PLACE}, expected cpu"),
        (None, f"NoneType as scores for {PLACE}, expected a tensor"),
        ([[1.0] * 3] * 4, f"list as scores for {PLACE}, expected a tensor"),
    ],
)
def test_scores_that_do_not(scores: Any, message: str) -> None:
    assert_rejected(message, checks.check_scores, PLACE, torch.rand(4, 3), scores)


def test_an_edited_argument() -> None:
    weight = torch.rand(4, 3)
    checks.check_unchanged(WHO, PLACE, weight.clone(), weight)
    assert_rejected(f"edited the weight of {PLACE} in place", checks.check_unchanged, PLACE, weight, weight + 1)
    assert_rejected(
        f"edited the mask of {PLACE} in place", checks.check_unchanged, PLACE, weight, weight[:2], "the mask"
    )


def test_an_allocation_that_fits() -> None:
    checks.check_allocation(WHO, [A, B], 0.5, {"a": 0.5, "b": 0.5})
    checks.check_allocation(WHO, [A, B], 0.45, {"a": 0, "b": 0.999})  # 12 and 10 weights: 0.4541 of all


@pytest.mark.parametrize(
    ("result", "message"),
    [
        *(({"a": 0.5, "b": value}, f"gave b the sparsity {value!r}") for value in (1, 1.0, -0.1, NAN, None, "0.5")),
        ({"a": False, "b": 0}, "gave a the sparsity False"),
        ({"a": 0.5}, "gave b the sparsity None, expected a number in [0, 1)"),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, "gave 'c' a sparsity, which is not one of the given layers"),
        ([0.5, 0.5], "returned list, expected a mapping"),
        ({"a": 0.52, "b": 0.5}, "gave all layers together a sparsity of 0.5109, where 0.5 was asked for"),
        ({"a": 0, "b": 0.999}, "gave all layers together a sparsity of 0.4541, where 0.5 was asked for"),
    ],
)
def test_an_allocation_that_does_not(result: Any, message: str) -> None:
    assert_rejected(message, checks.check_allocation, [A, B], 0.5, result)


ZERO = torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]])
GRID = Grid(torch.full((4, 2), 0.1), ZERO, group_size=3, bits=4)
ORDER = torch.tensor([0, 1, 0, 1, 0, 1])
PRUNED = torch.zeros(4, 6, dtype=torch.bool)


@pytest.mark.parametrize(
    "grid",
    [
        GRID,
        *(replace(GRID, group_index=ORDER.to(dtype)) for dtype in (torch.int64, torch.int32, torch.uint8)),
        replace(GRID, scale=GRID.scale.bfloat16(), zero=ZERO.to(torch.uint8)),
        replace(GRID, group_size=4),  # the last group is a short one
        Grid(GRID.scale[:, :1], ZERO[:, :1], group_size=-1, bits=3),
        Grid(GRID.scale[:, :1], ZERO[:, :1], group_size=128, bits=3),
    ],
    ids=repr,
)
def test_codes_that_fit(grid: Grid) -> None:
    """All pruned, every entry takes the zero of its group, told entry by entry; and one off is caught."""
    size = 6 if grid.group_size == -1 else grid.group_size
    groups = grid.group_index.tolist() if grid.group_index is not None else [i // size for i in range(6)]
    codes = torch.tensor([[int(grid.zero[row, group]) for group in groups] for row in range(4)])
    for mask in (PRUNED, None):
        checks.check_quantized(WHO, PLACE, Quantized(codes, grid), torch.rand(4, 6), mask)
    for row, column in ((0, 0), (1, 3), (3, 5)):
        moved = codes.clone()
        moved[row, column] -= 1
        arguments = (PLACE, Quantized(moved, grid), torch.rand(4, 6), PRUNED)
        assert_rejected(f"changed 1 pruned weights of {PLACE}", checks.check_quantized, *arguments)
        checks.check_quantized(WHO, PLACE, Quantized(moved, grid), torch.rand(4, 6), ~PRUNED)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": ORDER}, f"codes of shape [6] for {PLACE}, expected [4, 6]"),
        ({"codes": PRUNED.float()}, f"codes of torch.float32 for {PLACE}, expected an integer type"),
        ({"codes": PRUNED}, f"codes of torch.bool for {PLACE}, expected an integer type"),
        ({"codes": PRUNED + 16}, f"codes outside [0, 15] for {PLACE}"),
        ({"codes": PRUNED.long() - 1}, f"codes outside [0, 15] for {PLACE}"),
        ({"codes": None}, f"NoneType as codes for {PLACE}"),
        ({"grid": None}, f"{PLACE}, expected Quantized with a Grid"),
        ({"zero": ZERO[:, :1]}, f"zero points of shape [4, 1] for {PLACE}, expected [4, 2]"),
        ({"zero": ZERO.T}, f"zero points of shape [2, 4] for {PLACE}, expected [4, 2]"),
        ({"zero": ZERO.float()}, f"zero points of torch.float32 for {PLACE}, expected an integer type"),
        ({"zero": ZERO + 8}, f"zero points outside [0, 15] for {PLACE}"),
        ({"zero": ZERO - 2}, f"zero points outside [0, 15] for {PLACE}"),
        ({"zero": ZERO.to("meta")}, f"zero points on meta for {PLACE}, expected cpu"),
        ({"scale": GRID.scale[:1]}, f"scales of shape [1, 2] for {PLACE}, expected [4, 2]"),
        ({"scale": ZERO}, f"scales of torch.int64 for {PLACE}, expected a floating type"),
        ({"scale": GRID.scale / 0}, f"scales with values that are not finite for {PLACE}"),
        ({"scale": GRID.scale * 0}, f"scales for {PLACE} that are not above 0"),
        ({"scale": -GRID.scale}, f"scales for {PLACE} that are not above 0"),
        ({"scale": 0.1}, f"float as scales for {PLACE}"),
        *(({"bits": bits}, f"a grid of {bits!r} bits for {PLACE}") for bits in (0, -4, 17, 4.0, True, None)),
        ({"bits": 3}, f"codes outside [0, 7] for {PLACE}"),
        *(({"group_size": size}, f"group size {size!r} for {PLACE}") for size in (0, -2, 3.0, True, None)),
        ({"group_size": 2}, f"zero points of shape [4, 2] for {PLACE}, expected [4, 3]"),
        ({"group_size": -1}, f"zero points of shape [4, 2] for {PLACE}, expected [4, 1]"),
        ({"group_index": ORDER[:5]}, f"group indices of shape [5] for {PLACE}, expected [6]"),
        ({"group_index": ORDER + 1}, f"group indices outside [0, 1] for {PLACE}"),
        ({"group_index": ORDER - 1}, f"group indices outside [0, 1] for {PLACE}"),
        ({"group_index": ORDER.float()}, f"group indices of torch.float32 for {PLACE}, expected an integer type"),
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [PRUNED, None], ids=["sparse", "dense"])
def test_codes_that_do_not(change: dict[str, Any], message: str, mask: Tensor | None) -> None:
    on_grid = {key: value for key, value in change.items() if key not in ("codes", "grid")}
    good = Quantized(ZERO.repeat_interleave(3, 1), replace(GRID, **on_grid))
    bad = good if on_grid else replace(good, **change)
    assert_rejected(message, checks.check_quantized, PLACE, bad, torch.rand(4, 6), mask)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda floats: floats[:2], f"compensated weights of shape [2, 6] for {PLACE}, expected [4, 6]"),
        (lambda floats: floats.long(), f"compensated weights of torch.int64 for {PLACE}, expected a floating type"),
        (lambda floats: floats / 0, f"compensated weights with values that are not finite for {PLACE}"),
        (lambda floats: floats + 0.06, f"compensated weights of {PLACE} of which 24 do not round to their codes"),
        (lambda floats: floats + 0.04, f"compensated weights of {PLACE} that are not 0 where 24 weights are pruned"),
    ],
)
def test_compensated_floats(change: Callable[[Tensor], Tensor], message: str) -> None:
    codes, floats = ZERO.repeat_interleave(3, 1), torch.zeros(4, 6)
    good, bad = (Quantized(codes, GRID, given) for given in (floats, change(floats)))
    checks.check_quantized(WHO, PLACE, good, torch.rand(4, 6), PRUNED)
    assert_rejected(message, checks.check_quantized, PLACE, bad, torch.rand(4, 6), PRUNED)
    checks.check_quantized(WHO, PLACE, replace(good, compensated=floats + 0.04), torch.rand(4, 6), ~PRUNED)
    nothing, promised = f"NoneType as compensated weights for {PLACE}", True
    assert_rejected(nothing, checks.check_quantized, PLACE, Quantized(codes, GRID), floats, PRUNED, promised)


def test_no_codes_at_all() -> None:
    assert_rejected(
        f"NoneType for {PLACE}, expected Quantized", checks.check_quantized, PLACE, None, torch.rand(4, 6), None
    )


def test_a_space_that_fits() -> None:
    checks.check_space(WHO, [A, B], SPACE)
    checks.check_space(WHO, [A, B], SearchSpace((RankGroup("both", (4, 2), ("b", "a")),)))


def with_first(**changes: Any) -> SearchSpace:
    return SearchSpace((replace(GROUP_A, **changes), GROUP_B))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (None, "NoneType, expected SearchSpace"),
        (SearchSpace((GROUP_A,)), "has b in 0 groups, expected 1"),
        (SearchSpace((GROUP_A, GROUP_B, GROUP_A)), "has a in 2 groups, expected 1"),
        (SearchSpace((GROUP_A, replace(GROUP_B, members=("b", "c")))), "has c in 1 groups, expected 0"),
        (SearchSpace([GROUP_A, GROUP_B]), "expected tuples"),  # type: ignore[arg-type]
        *((with_first(ranks=ranks), "group ga the ranks [") for ranks in ((), (2, 4), (4, 4), (4, 0), (4.0,), (True,))),
        (with_first(ranks=[4, 2]), "expected tuples"),
        (with_first(members=["a"]), "expected tuples"),
    ],
    ids=str,
)
def test_a_space_that_does_not(space: Any, message: str) -> None:
    assert_rejected(message, checks.check_space, [A, B], space)


def test_a_choice() -> None:
    checks.check_choice(WHO, SPACE, RankConfig((2, 3)))
    wrong: tuple[Any, ...] = ((3, 3), (2,), (2, 3, 3), [2, 3], (2.0, 3), None)
    for choice in (*map(RankConfig, wrong), (2, 3), None):
        assert_rejected(repr(choice), checks.check_choice, SPACE, choice)


class Told(torch.nn.Module):
    """Factors of one 4 × 3 layer at rank 4, with what a test puts in their place."""

    def __init__(self, **told: Any) -> None:
        super().__init__()
        self.B, self.A = told.get("B", torch.zeros(4, 4)), told.get("A", torch.rand(4, 3))
        self.scale, self.rank, self.told = told.get("scale", 1.0), told.get("rank", 4), told

    def factors(self, rank: int) -> Any:
        return self.told.get("factors", (self.B[:, :rank], self.A[:rank], self.scale))


@pytest.mark.parametrize("ranks", [(4, 2), (4,), ()])
def test_factors_that_fit(ranks: tuple[int, ...]) -> None:
    checks.check_delta(WHO, A, Told(), ranks)
    checks.check_delta(WHO, A, Told(B=torch.ones(4, 4), A=torch.zeros(4, 3)), ranks)
    checks.check_delta(WHO, A, LowRankDelta(A, 4, 1.0, torch.Generator()), ranks)


@pytest.mark.parametrize(
    ("delta", "message"),
    [
        (Told(A=torch.rand(4, 5)), "A of shape [4, 5] for a, expected [4, 3]"),
        (Told(B=torch.zeros(3, 4)), "B of shape [3, 4] for a, expected [4, 4]"),
        (Told(B=torch.zeros(4, 2), A=torch.rand(2, 3)), "B of shape [4, 2] for a, expected [4, 4]"),
        (Told(B=torch.ones(4, 4)), "starts a with a delta that is not zero"),
        (Told(A=torch.full((4, 3), NAN)), "A with values that are not finite for a"),
        (Told(B=torch.zeros(4, 4).bfloat16()), "B of torch.bfloat16 for a, expected float32"),
        (Told(A=torch.rand(4, 3).double()), "A of torch.float64 for a, expected float32"),
        (Told(A=torch.rand(4, 3, device="meta")), "A on meta for a, expected cpu"),
        (Told(scale=INF), "scale inf for a"),
        (Told(scale=None), "scale None for a"),
        (Told(rank=4.0), "rank 4.0 for a"),
        (Told(factors=None), "factors for a that are not (B, A, scale)"),
        (torch.nn.Identity(), "rank None for a"),
        (object(), "object for a, expected a torch.nn.Module"),
    ],
)
@pytest.mark.parametrize("ranks", [(4, 2), ()])
def test_factors_that_do_not(delta: Any, message: str, ranks: tuple[int, ...]) -> None:
    assert_rejected(message, checks.check_delta, A, delta, ranks)


def test_smaller_ranks_are_checked_too() -> None:
    class Stubborn(Told):
        def factors(self, rank: int) -> Any:
            return super().factors(4)

    checks.check_delta(WHO, A, Stubborn())
    assert_rejected("B of shape [4, 4] for a, expected [4, 2]", checks.check_delta, A, Stubborn(), (4, 2))
    assert_rejected("a delta of rank 4 for a, expected 8", checks.check_delta, A, Told(), (8, 4))


MASK = torch.tensor([[True, False, True], [False, False, True]])
SPARSE = BaseWeight(torch.ones(2, 3) * MASK, MASK)


def test_an_effective_weight_that_fits() -> None:
    checks.check_effective(WHO, PLACE, SPARSE, SPARSE.weight * 2, True)
    checks.check_effective(WHO, PLACE, SPARSE, SPARSE.weight + 1, False)
    checks.check_effective(WHO, PLACE, BaseWeight(SPARSE.weight), SPARSE.weight + 1, True)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (SPARSE.weight + 1, f"turned 3 zeros of the base nonzero in {PLACE}"),
        (SPARSE.weight.T, f"an effective weight of shape [3, 2] for {PLACE}, expected [2, 3]"),
        (SPARSE.weight / 0, f"an effective weight with values that are not finite for {PLACE}"),
        (SPARSE.weight.long(), f"an effective weight of torch.int64 for {PLACE}"),
        (None, f"NoneType as an effective weight for {PLACE}"),
    ],
)
def test_an_effective_weight_that_does_not(result: Any, message: str) -> None:
    assert_rejected(message, checks.check_effective, PLACE, SPARSE, result, True)
