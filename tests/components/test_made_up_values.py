"""Made-up values keep the promises of `Evaluate`, and end a search that would go on for ever."""

from __future__ import annotations

import pytest

from sqft.components import made_up_values
from sqft.components.made_up_values import RECORDS, SPACES, MadeUpValues
from sqft.errors import ContractError
from sqft.ranks import SearchSpace


def test_made_up_gradients_are_0_at_the_largest_rank() -> None:
    """As `Evaluate.first_order` promises; elsewhere they are not."""
    for space in SPACES:
        for group, changes in zip(space.groups, MadeUpValues("x", space, True).first_order(5), strict=True):
            for rank, change in zip(group.ranks, changes, strict=True):
                assert (change == 0) == (rank == max(group.ranks))


@pytest.mark.parametrize("space", SPACES)
def test_only_what_is_new_takes_time(space: SearchSpace) -> None:
    evaluate = MadeUpValues("x", space, True)
    largest = space.choice([0] * len(space.groups))
    assert evaluate.within(None) and evaluate.within(0.5)
    for samples, seconds in [(4, 1), (4, 1), (2, 1), (6, 2), (None, 3), (RECORDS, 3), (RECORDS + 1, 3)]:
        evaluate(largest, samples)
        assert evaluate.within(seconds + 0.5) and not evaluate.within(seconds)
    evaluate.first_order()
    assert evaluate.within(3.5)


def test_a_search_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(made_up_values, "MOST_QUESTIONS", 3)
    evaluate, choice = MadeUpValues("searcher 'x'", SPACES[1], False), SPACES[1].choice([0])
    for _ in range(3):
        evaluate(choice, 4)
    with pytest.raises(ContractError, match="searcher 'x' asked 3 questions, and did not end"):
        evaluate(choice, 4)
