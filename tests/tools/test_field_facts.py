"""The facts of fields in words, for all kinds of types and limits."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from sqft.recipe.fields import Count, Fraction
from sqft.recipe.sections import Evaluate, Finetune, Search, Sparsify
from sqft.tools.field_facts import FieldFacts, field_facts


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Inner(BaseModel):
    depth: int = 3


class Options(BaseModel):
    count: Count = Field(3, description="how many")
    share: Fraction
    rate: Annotated[float, Field(gt=0, le=10_000)] = 1e-8
    color: Color = Color.RED
    inner: Inner = Inner()
    way: Literal["up"] = "up"
    maybe: int | None = None
    made: dict[str, Fraction] = Field(default_factory=dict)
    names: Annotated[tuple[str, ...], Field(min_length=1)] = ("*",)
    groups: list[list[str]] = []
    code: Annotated[str, Field(pattern="^a+$")] = "a"


@pytest.mark.parametrize(
    ("name", "takes", "default"),
    [
        ("count", "whole number, at least 1", "default `3`"),
        ("share", "number, at least 0, less than 1", "required"),
        ("rate", "number, more than 0, at most 10000", "default `1e-08`"),
        ("color", 'one of `"red"`, `"blue"`', 'default `"red"`'),
        ("inner", "object", 'default `{"depth": 3}`'),
        ("way", '`"up"`', 'default `"up"`'),
        ("maybe", "whole number, or `null`", "default `null`"),
        ("made", "object (each value: number, at least 0, less than 1)", "default `{}`"),
        ("names", "list (each item: text), not empty", 'default `["*"]`'),
        ("groups", "list (each item: list (each item: text))", "default `[]`"),
        ("code", 'text, of the form `"^a+$"`', 'default `"a"`'),
    ],
)
def test_an_option(name: str, takes: str, default: str) -> None:
    facts = {fact.name: fact for fact in field_facts(Options)}[name]
    assert (facts.takes, facts.default) == (takes, default)


def of(section: type[BaseModel], name: str) -> FieldFacts:
    return {fact.name: fact for fact in field_facts(section)}[name]


def test_fields_of_the_recipe() -> None:
    assert of(Search, "searcher").default == 'default `"heuristic"`'  # in its short form
    assert of(Sparsify, "pattern").default == 'default `"row"`'
    assert of(Finetune, "data").takes == "text, or object, or list of these, not empty"
    assert of(Evaluate, "batch_size").takes == 'whole number, at least 1, or `"auto"`'


def test_a_line_for_the_terminal() -> None:
    lines = list(map(str, field_facts(Options)))
    assert lines[:2] == [
        "count: whole number, at least 1; default 3; how many",
        "share: number, at least 0, less than 1; required",
    ]


def test_lists_of_a_certain_length() -> None:
    class Lists(BaseModel):
        pair: tuple[int, str] = (1, "a")
        nothing: tuple[()] = ()
        few: list[int] = Field([1, 2], min_length=2, max_length=3)
        many: Annotated[list[int], Field(min_length=2)]
        name: Annotated[str, Field(min_length=1, max_length=8)]
        even: Annotated[int, Field(multiple_of=2)]

    assert {facts.name: facts.takes for facts in field_facts(Lists)} == {
        "pair": "list (whole number; text)",
        "nothing": "list, of 0 to 0 items",
        "few": "list (each item: whole number), of 2 to 3 items",
        "many": "list (each item: whole number), of at least 2 items",
        "name": "text, of a length of at least 1, of a length of at most 8",
        "even": "whole number, a multiple of 2",
    }
