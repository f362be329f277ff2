"""Data in a recipe: short forms, templates by name, one data set or several."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from sqft.data.templates import TEMPLATES
from sqft.recipe.data import Data, DataRef, DataRefs, TrainingData

ONE: TypeAdapter[Any] = TypeAdapter(DataRef)
SEVERAL: TypeAdapter[Any] = TypeAdapter(DataRefs)


def test_a_path_is_short_for_a_data_set() -> None:
    data = ONE.validate_python("a.jsonl")
    assert data == Data(path="a.jsonl") and (data.split, data.limit, data.prompt) == ("train", None, None)
    assert SEVERAL.validate_python("a.jsonl") == TrainingData(path="a.jsonl")


def test_several_data_sets_keep_their_order_and_weights() -> None:
    several = SEVERAL.validate_python(["b.jsonl", {"path": "a.jsonl", "weight": 0.5}])
    assert several == (TrainingData(path="b.jsonl"), TrainingData(path="a.jsonl", weight=0.5))


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_a_template_by_name(name: str) -> None:
    prompt = Data(path="a", prompt=name).prompt  # type: ignore[arg-type]
    assert prompt is not None and (prompt.prompt, prompt.completion) == tuple(TEMPLATES[name])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("gsm9k", "no prompt template is named 'gsm9k'; choose from gsm8k, "),
        ({"prompt": "{{a", "completion": "b"}, "not a valid Jinja template"),
        ({"prompt": "{{a}}"}, "Field required"),
        ({"prompt": "", "completion": "b"}, "at least 1 character"),
        (3, "valid dictionary"),
    ],
)
def test_a_template_that_is_none(prompt: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Data(path="a", prompt=prompt)


@pytest.mark.parametrize("weight", [0, -1, 1001, "x"])
def test_weights_have_a_range(weight: Any) -> None:
    with pytest.raises(ValidationError):
        TrainingData(path="a", weight=weight)


def test_only_training_data_have_a_weight() -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        ONE.validate_python({"path": "a", "weight": 2})
    with pytest.raises(ValidationError, match="at least 1 item"):
        SEVERAL.validate_python([])
