"""Configurations of ranks, and their neighbours."""

from __future__ import annotations

from itertools import product
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from sqft.ranks import RankGroup, SearchSpace


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
