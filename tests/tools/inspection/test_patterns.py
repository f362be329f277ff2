"""N:M patterns, against a count of every group by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sqft.kernels.masks import keep_mask
from sqft.tools.inspection.patterns import GroupCounts


def pattern(mask: Tensor, *cuts: int, along_rows: bool = False) -> str | None:
    """The pattern of a mask that is counted in pieces of so many rows, or columns."""
    counts = GroupCounts(mask.shape[1])
    for piece in mask.tensor_split(cuts, 1 if along_rows else 0):
        counts.add(piece)
    return counts.pattern


def fullest(mask: Tensor, of: int) -> int:
    """Most weights in a group, in plain Python."""
    rows = mask.tolist()
    return max(sum(row[start : start + of]) for row in rows for start in range(0, len(row), of))


def random_mask(kept: int, of: int, rows: int = 64, columns: int = 96) -> Tensor:
    scores = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0))
    return keep_mask(scores, 0.0, f"{kept}:{of}")


def rows(*texts: str) -> Tensor:
    """A mask by hand: "1" where a weight stays."""
    return torch.tensor([[digit == "1" for digit in text.replace(" ", "")] for text in texts])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (rows("1100 0110", "0101 1001"), "2:4"),
        (rows("1010 0110", "0101 1001"), "1:2"),
        (rows("1110 0100 0001 1101", "0000 1111 1111 0000"), "4:8"),
        (rows("1110 0100", "0000 1111"), None),  # whole rows
        (rows("1000 0010", "0001 0000"), "1:4"),
        (rows("1000 0000 0000 0010", "0001 0000 1000 0000"), "1:8"),
        (rows("1110 0111", "1011 1101"), "3:4"),
        (rows("1111 0000", "1111 1111"), None),
        (rows("0000 0000", "0000 0000"), "0:2"),
        (rows("1100 0110 01", "0101 1001 11"), None),  # 10 inputs have pairs alone
        (rows("1100 0110 0011", "0101 1001 1001"), "2:4"),  # 12 are no multiple of 8
        (rows("110 011 101"), None),  # 9 are no multiple of any M
    ],
)
def test_masks_by_hand(mask: Tensor, expected: str | None) -> None:
    assert pattern(mask) == expected


@pytest.mark.parametrize(("kept", "of"), [(1, 2), (2, 4), (3, 4), (4, 8), (8, 16), (16, 32)])
def test_random_masks_and_one_group_that_breaks_it(kept: int, of: int) -> None:
    mask = random_mask(kept, of)
    assert fullest(mask, of) == kept and pattern(mask) == f"{kept}:{of}"
    row, group = 40, mask[40, of : 2 * of]
    group[(~group).nonzero()[0]] = True
    assert mask[row, of : 2 * of].sum() == fullest(mask, of) == kept + 1
    assert pattern(mask) is None


def test_a_weaker_pattern_that_is_left_when_one_is_broken() -> None:
    mask = random_mask(2, 8)
    assert pattern(mask) == "2:8"
    mask[40, 8:16] = torch.tensor([True, True, False, False, True, False, False, False])
    assert fullest(mask, 8) == 3 and fullest(mask, 4) == 2 and pattern(mask) == "2:4"


def test_pieces_are_counted_as_the_whole() -> None:
    mask = random_mask(4, 8)
    assert pattern(mask, 1, 7, 60) == pattern(mask, 0, 32, 32, 64, along_rows=True) == "4:8"
    mask[40, 8:16] = True
    assert pattern(mask, 1, 7, 60) is None and pattern(mask, 32, 64, along_rows=True) is None


def test_more_zeros_than_the_pattern_asks_for() -> None:
    """As rounding to codes makes them: half of the weights that stay."""
    mask = random_mask(2, 4)
    more = torch.rand(mask.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    assert pattern(mask & more) == "2:4"


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7, 0.9, 0.97])
def test_what_is_pruned_by_rows_keeps_no_pattern(sparsity: float) -> None:
    scores = torch.rand(256, 256, generator=torch.Generator().manual_seed(0))
    assert pattern(keep_mask(scores, sparsity, "row")) is None


def test_nothing() -> None:
    assert pattern(torch.zeros(0, 8, dtype=torch.bool)) is None
    assert pattern(torch.zeros(4, 0, dtype=torch.bool)) is None
