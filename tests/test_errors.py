"""What an error says: every mistake with its place, and one family for all that a user can fix."""

from __future__ import annotations

import pytest

from sqft import errors
from sqft.errors import Problem, RecipeError, SqftError


def test_every_error_is_one_that_the_user_can_fix() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 5 and all(issubclass(kind, SqftError) and kind.__doc__ for kind in kinds)


@pytest.mark.parametrize(("place", "text"), [("sparsify.scorer", "sparsify.scorer: is unknown"), ("", "is unknown")])
def test_a_problem_begins_with_its_place(place: str, text: str) -> None:
    assert str(Problem(place, "is unknown")) == text


def test_a_recipe_error_lists_all_problems() -> None:
    one, two = Problem("a", "is bad"), Problem("b.c", "is worse")
    assert str(RecipeError([one])) == "recipe: 1 problem\n  a: is bad"
    error = RecipeError([one, two], "r.json", {"name": "x"})
    assert str(error) == "r.json: 2 problems\n  a: is bad\n  b.c: is worse"
    assert (error.problems, error.source, error.rest) == ((one, two), "r.json", {"name": "x"})
