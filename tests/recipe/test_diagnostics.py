"""pydantic's mistakes in a recipe's words, and the recipe that is left without them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from pydantic import ValidationError

from sqft import Recipe
from sqft.recipe.diagnostics import PLACEHOLDER, problems_of, related, without_mistakes

VALID: dict[str, Any] = {
    "name": "x",
    "model": {"path": "m"},
    "sparsify": {"scorer": "wanda"},
    "finetune": {"adapter": "nls", "merger": "sparsepeft", "data": ["a.jsonl", "b.jsonl"]},
}


def problems(raw: dict[str, Any], prefix: str = "") -> list[str]:
    with pytest.raises(ValidationError) as caught:
        Recipe.model_validate(raw)
    return [str(problem) for problem in problems_of(caught.value, Recipe, prefix)]


def changed(section: str, **values: Any) -> dict[str, Any]:
    return VALID | {section: VALID.get(section, {}) | values}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ({"model": {"path": "m"}}, "name: is missing"),
        (changed("sparsify", sparsity=2), "sparsify.sparsity: input should be less than 1, found 2"),
        (changed("sparsify", patern="2:4"), "sparsify.patern: unknown key; known here: .* Did you mean 'pattern'?"),
        (changed("finetune", lr=1), "finetune.lr: unknown key; known here: .* Did you mean 'learning_rate'?"),
        (changed("finetune", targets="q_proj"), 'finetune.targets: input should be a list, found "q_proj"'),
        (
            changed("finetune", targets="all-linear"),
            r'finetune.targets: .* a list, found "all-linear"; \["\*"\] is all',
        ),
        (changed("sparsify", xyzzy=1), "sparsify.xyzzy: unknown key; known here: .*exclude."),
        (changed("finetune", data=[]), "finetune.data: tuple should have at least 1 item"),
        (
            changed("finetune", data=["b", {"path": "a", "wight": 2}]),
            "finetune.data.1.wight: .* Did you mean 'weight'?",
        ),
        (changed("finetune", data={"limit": 2}), "finetune.data.path: is missing"),
        (changed("evaluate", tasks=["a", "a"]), "evaluate.tasks: 'a' is listed twice; keep one"),
        (changed("finetune", optimizer="adamw"), ".* found \"adamw\". Did you mean 'adamw_8bit' or 'adamw_torch'?"),
        (changed("finetune", optimizer=1), r".*rmsprop_bnb_32bit', found 1$"),
        (VALID | {"sparsfy": {}}, "sparsfy: unknown key; .* Did you mean 'sparsify'?"),
    ],
)
def test_a_mistake_in_the_words_of_a_recipe(raw: dict[str, Any], expected: str) -> None:
    (problem,) = problems(raw)
    assert re.match(expected.replace("?", "[?]"), problem), problem
    (within,) = problems(raw, "recipes.0")
    assert within == f"recipes.0.{problem}"


def test_a_long_value_is_shortened() -> None:
    (problem,) = problems(changed("sparsify", sparsity=list(range(100))))
    assert problem.endswith("...") and len(problem) < 150


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ("a.b", "a.b", True),
        ("a", "a.b", True),
        ("a.b.c", "a.b", True),
        ("a.b", "a.c", False),
        ("a.b", "a.bc", False),
        ("a.1", "a.10", False),
    ],
)
def test_places_that_lie_in_one_another(one: str, other: str, expected: bool) -> None:
    assert related(one, other) is related(other, one) is expected


@pytest.mark.parametrize(
    ("raw", "left"),
    [
        (VALID, VALID),
        (changed("sparsify", sparsity=2, pattern="2:4"), changed("sparsify", pattern="2:4")),
        (changed("sparsify", patern="2:4"), VALID),
        (
            changed("finetune", data=["a.jsonl", 5, "b.jsonl", {"path": 7}]),
            changed("finetune", data=["a.jsonl", "b.jsonl", PLACEHOLDER]),
        ),
        (changed("finetune", merger=5), changed("finetune", merger=PLACEHOLDER)),
        (changed("finetune", adapter={"nam": "nls"}), changed("finetune", adapter=PLACEHOLDER)),
        ({key: value for key, value in VALID.items() if key != "model"}, VALID | {"model": {"path": PLACEHOLDER}}),
        ({key: value for key, value in VALID.items() if key != "name"}, VALID | {"name": PLACEHOLDER}),
        (VALID | {"finetune": 3}, None),
    ],
)
def test_the_recipe_without_its_mistakes(raw: Any, left: dict[str, Any] | None) -> None:
    before = repr(raw)
    recipe = without_mistakes(Recipe, raw)
    assert repr(raw) == before
    assert recipe == (Recipe.model_validate(left) if left else None)
