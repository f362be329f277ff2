"""The sections of a recipe: what they fill in, and which of their values do not agree."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sqft.errors import RecipeError
from sqft.recipe.data import TrainingData
from sqft.recipe.recipe import Recipe
from sqft.recipe.rerun import with_absolute_paths
from sqft.recipe.sections import ComponentRef, Evaluate, Finetune, Model, Search, Sparsify
from sqft.types import Pattern


@pytest.mark.parametrize(
    ("given", "sparsity", "pattern"),
    [
        ({}, 0.5, "row"),
        ({"pattern": "layer", "sparsity": 0.25}, 0.25, "layer"),
        ({"pattern": "1:4"}, 0.75, "1:4"),
        ({"pattern": "2:4", "sparsity": 0.5}, 0.5, "2:4"),
        ({"pattern": "2:3", "sparsity": 0.3333}, 0.3333, "2:3"),
    ],
)
def test_sparsity_and_pattern(given: dict[str, Any], sparsity: float, pattern: str) -> None:
    section = Sparsify.model_validate({"scorer": "wanda", **given})
    assert (section.sparsity, section.pattern) == (sparsity, Pattern.parse(pattern))
    assert section.model_dump()["pattern"] == pattern
    assert Sparsify.model_validate(section.model_dump()) == section


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pattern": "1:4", "sparsity": 0.5}, "'1:4' is a sparsity of 0.75, not 0.5"),
        ({"pattern": "5:4"}, "pattern '5:4' must be 'row', 'layer' or 'N:M'"),
        ({"pattern": 4}, "should be a valid string"),
        ({"sparsity": 1}, "less than 1"),
    ],
)
def test_a_sparsity_that_does_not_agree(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Sparsify.model_validate({"scorer": "wanda", **given})


@pytest.mark.parametrize("name", ["wanda", "mine/wanda", "My_Plugin.2/w-1"])
def test_a_component_by_its_name_alone(name: str) -> None:
    assert Sparsify.model_validate({"scorer": name}).scorer == ComponentRef(name=name)


@pytest.mark.parametrize("name", ["Wanda", "a/b/c", "w_1", "", "/wanda"])
def test_names_that_no_component_can_have(name: str) -> None:
    with pytest.raises(ValidationError, match="should match pattern"):
        ComponentRef(name=name)


FINETUNE: dict[str, Any] = {"adapter": "nls", "merger": "sparsepeft"}


def test_data_sets_by_the_key_of_their_files() -> None:
    one = Finetune.model_validate({**FINETUNE, "data": "a"})
    assert one.data_sets == {"data": TrainingData(path="a")}
    several = Finetune.model_validate({**FINETUNE, "data": ["a", {"path": "b"}]})
    assert several.data_sets == {"data.0": TrainingData(path="a"), "data.1": TrainingData(path="b")}


@pytest.mark.parametrize("ratio", [0, 1e300])
def test_a_ratio_that_no_learning_rate_can_have(ratio: float) -> None:
    with pytest.raises(ValidationError, match=r"learning_rate_ratio\n.*(greater than 0|less than or equal to 10000)"):
        Finetune.model_validate({**FINETUNE, "data": "a", "learning_rate_ratio": ratio})


def test_one_tracker_needs_no_list() -> None:
    assert Finetune.model_validate({**FINETUNE, "data": "a", "report_to": "wandb"}).report_to == ("wandb",)


def test_a_task_is_listed_once() -> None:
    assert Evaluate.model_validate({"tasks": ["a", "b"]}).tasks == ("a", "b")
    with pytest.raises(ValidationError, match="'a' is listed twice; keep one"):
        Evaluate.model_validate({"tasks": ["a", "b", "a"]})


@pytest.mark.parametrize("tolerance", [0.001, -1, float("inf")])
def test_a_tolerance_is_of_numbers(tolerance: float) -> None:
    with pytest.raises(ValidationError, match=r"is for numbers|greater than or equal to 0|finite"):
        Evaluate.model_validate({"exact_match": {"data": "test.jsonl", "tolerance": tolerance}})
    with pytest.raises(ValidationError, match=r"is for numbers|greater than or equal to 0|finite"):
        Search.model_validate({"tolerance": tolerance})


def test_sections_are_frozen_and_know_their_keys() -> None:
    model = Model(path="m")
    with pytest.raises(ValidationError, match="frozen"):
        model.path = "other"
    with pytest.raises(ValidationError, match="Extra inputs"):
        Model.model_validate({"path": "m", "pth": "m"})


def test_a_sparsity_that_the_pattern_gives_is_not_stored(raw: dict[str, Any]) -> None:
    raw["sparsify"] = {"scorer": "magnitude", "pattern": "2:4"}
    stored = with_absolute_paths(Recipe.parse(raw))
    assert stored["sparsify"]["pattern"] == "2:4" and "sparsity" not in stored["sparsify"]
    changed = Recipe.changed(stored, ["sparsify.pattern=1:4"])
    assert changed.sparsify is not None and changed.sparsify.sparsity == 0.75


def test_packed_floats_are_loaded_in_bfloat16_unless_the_recipe_says_otherwise(raw: dict[str, Any]) -> None:
    raw["model"]["dequantize"] = True
    recipe = Recipe.parse(raw)
    assert recipe.model.dtype == "bfloat16" and "dtype" not in recipe.model.model_fields_set
    stored = Recipe.parse(with_absolute_paths(recipe))
    assert stored.model.dtype == "bfloat16"
    assert Recipe.changed(with_absolute_paths(recipe), ["model.dequantize=false"]).model.dtype == "float32"
    raw["model"]["dtype"] = "float32"
    assert Recipe.parse(raw).model.dtype == "float32"


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("batch_size", 0, "input should be greater than or equal to 1, found 0"),
        ("batch_size", "all", "input should be 'auto', found \"all\""),
        ("apply_chat_template", 3, "input should be a valid boolean, unable to interpret input, found 3"),
    ],
)
def test_a_field_of_two_types_is_named_as_the_recipe_does(option: str, value: Any, message: str) -> None:
    raw = {"name": "x", "model": {"path": "m"}, "evaluate": {"tasks": ["arc_easy"], option: value}}
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(raw)
    assert [str(problem) for problem in caught.value.problems] == [f"evaluate.{option}: {message}"]
    for good in ({"batch_size": 3}, {"batch_size": "auto"}, {"apply_chat_template": "tool_use"}):
        evaluate = Recipe.parse({**raw, "evaluate": good}).evaluate
        assert evaluate and evaluate.model_dump(exclude_unset=True) == good
