"""Values that pass between the core and components."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sqft.ranks import RankGroup, SearchSpace
from sqft.types import Pattern


@pytest.mark.parametrize(
    ("text", "kept", "of", "sparsity"),
    [("row", 0, 0, None), ("layer", 0, 0, None), ("2:4", 2, 4, 0.5), ("1:4", 1, 4, 0.75), ("4:4", 4, 4, 0.0)],
)
def test_a_pattern_is_read_once_and_gives_its_word_back(text: str, kept: int, of: int, sparsity: float | None) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.kept, pattern.of, pattern.sparsity, str(pattern)) == (kept, of, sparsity, text)
    assert pattern == Pattern.parse(text)


@pytest.mark.parametrize("text", ["5:4", "0:4", "0:0", "2:0", "-1:3", "2:3:3", "2:", "rows", ""])
def test_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=f"pattern '{text}' must be 'row', 'layer' or 'N:M'"):
        Pattern.parse(text)


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 3)), min_size=1, max_size=3), st.integers(1, 3), st.data())
def test_neighbours(groups: list[tuple[int, int]], step: int, data: st.DataObject) -> None:
    """Of all that is within reach: what is not visited, each once, never the anchor, and as many as there are."""
    space = SearchSpace(tuple(RankGroup(str(i), tuple(range(n, 0, -1)), ()) for i, (n, _) in enumerate(groups)))
    anchor = tuple(at % n for n, at in groups)
    reach = [
        moved
        for moved in product(*(range(n) for n, _ in groups))
        if moved != anchor and all(abs(a - b) <= step for a, b in zip(anchor, moved, strict=True))
    ]
    visited = set(data.draw(st.lists(st.sampled_from(reach), unique=True))) if reach else set()
    free = set(reach) - visited
    count = data.draw(st.integers(1, 70))
    known = {*visited}
    found = space.neighbours(anchor, step, count, known, Random(0))
    assert len(found) == len(set(found)) == min(count, len(free)) and set(found) <= free
    assert known == visited | set(found)
