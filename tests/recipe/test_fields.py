"""A field says once what it is, and everything that asks follows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated, Any

import pytest
from layouts import LAYOUTS
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from sqft import Recipe, Registry
from sqft.planning.fingerprint import settings_of
from sqft.planning.plan import Step
from sqft.planning.planner import make_plan
from sqft.planning.resolution import Resolver
from sqft.recipe.fields import (
    Count,
    Fraction,
    NoEffect,
    OutputPath,
    Section,
    ShortForm,
    fields_marked,
    fields_of,
    section_in,
    short_form_of,
)
from sqft.recipe.reading import apply
from sqft.recipe.rerun import paths, with_absolute_paths
from sqft.recipe.sections import Sparsify
from sqft.tools import presets
from sqft.types import InputPath
from sqft.utils.digests import Digests


class Inner(Section):
    """A section with one field of each sort."""

    text: Annotated[str, InputPath()]
    logs: Annotated[str | None, OutputPath()] = None
    verbose: Annotated[bool, NoEffect()] = False
    power: int = 1


class More(Section):
    """Sections alone, in a list, and as one of several types, all with a short form."""

    one: Annotated[Inner, ShortForm("text")]
    several: tuple[Annotated[Inner, ShortForm("text")], ...] = ()
    perhaps: Annotated[Inner, ShortForm("text")] | None = None


class MarkedRecipe(Recipe):
    """A recipe with a section that no other code knows."""

    more: More | None = None


RAW: dict[str, Any] = {
    "name": "x",
    "model": {"path": "m"},
    "more": {"one": "a.txt", "several": ["b.txt", {"text": "c.txt", "logs": "l"}], "perhaps": {"text": "d.txt"}},
}
PLACES = {"more.one": "a.txt", "more.several.0": "b.txt", "more.several.1.text": "c.txt", "more.perhaps.text": "d.txt"}


def test_marked_values_in_short_forms_and_whole_ones() -> None:
    marked = list(fields_marked(MarkedRecipe, InputPath, RAW))
    assert {".".join(one.place): one.value for one in marked} == {"model.path": "m", **PLACES}
    assert all(one.marker == InputPath(hub=one.place[0] == "model") for one in marked)
    (logs,) = fields_marked(MarkedRecipe, OutputPath, RAW)
    assert (logs.place, logs.value) == (("more", "several", "1", "logs"), "l")


@pytest.mark.parametrize("teacher", ["dense", "d", {"model": "dense"}, {"model": "d"}], ids=str)
def test_a_word_in_place_of_a_path_is_none(teacher: Any, tmp_path: Path) -> None:
    finetune = {"adapter": "a", "merger": "m", "data": "t.jsonl", "teacher": teacher}
    recipe = Recipe.parse({"name": "x", "model": {"path": "m"}, "finetune": finetune}, tmp_path)
    named = teacher if isinstance(teacher, str) else teacher["model"]
    assert ("finetune.teacher.model" in paths(recipe)) == (named == "d")
    stored = with_absolute_paths(recipe)["finetune"]["teacher"]["model"]
    assert stored == ("dense" if named == "dense" else str(tmp_path / "d"))


@pytest.mark.parametrize("content", [None, 3, [], {"more": 3}, {"more": {"several": [3, None]}}, {"more": {"one": {}}}])
def test_what_does_not_fit_is_passed_over(content: Any) -> None:
    assert list(fields_marked(MarkedRecipe, (InputPath, OutputPath, NoEffect), content)) == []


def test_where_a_recipe_names_files() -> None:
    raw = {
        "model": {"path": "m"},
        "calibration": {"data": "c", "samples": 3},
        "finetune": {"data": ["a", {"path": "b"}], "validation": {"path": "v"}, "logging_dir": None, "save_every": 3},
        "search": {"data": "s"},
        "evaluate": {"of": ["x"], "perplexity": {"text": "t"}, "exact_match": {"data": "e"}, "include_path": "i"},
    }

    def places(*markers: type[Any]) -> dict[str, Any]:
        return {".".join(field.place): field.value for field in fields_marked(Recipe, markers, raw)}

    assert places(InputPath) == {
        "model.path": "m", "calibration.data": "c", "finetune.data.0": "a", "finetune.data.1.path": "b",
        "finetune.validation.path": "v", "search.data": "s", "evaluate.perplexity.text": "t",
        "evaluate.exact_match.data": "e", "evaluate.include_path": "i",
    }  # fmt: skip
    assert places(OutputPath, NoEffect) == {
        "finetune.logging_dir": None,
        "finetune.save_every": 3,
        "evaluate.of": ["x"],
    }


# -- what follows from a marker -----------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path) -> MarkedRecipe:
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / name).write_text("text")
    parsed = MarkedRecipe.parse(RAW, tmp_path)
    assert isinstance(parsed, MarkedRecipe)
    return parsed


def test_a_stored_recipe_names_its_files_absolutely(recipe: MarkedRecipe, tmp_path: Path) -> None:
    more = with_absolute_paths(recipe)["more"]
    assert more["one"] == {"text": str(tmp_path / "a.txt")}
    assert more["several"][1] == {"text": str(tmp_path / "c.txt"), "logs": str(tmp_path / "l")}
    assert set(paths(recipe).values()) == {"a.txt", "b.txt", "c.txt", "d.txt"}


def test_the_fingerprint_has_neither_paths_nor_what_has_no_effect(recipe: MarkedRecipe) -> None:
    assert recipe.more is not None
    assert settings_of(recipe.more) == {
        "one": {"power": 1}, "several": [{"power": 1}, {"power": 1}], "perhaps": {"power": 1},
    }  # fmt: skip


def test_a_file_of_a_stage_is_part_of_its_fingerprint(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """By its content; where work is written to, and what has no effect, is not."""

    class Longer(Sparsify):
        more: Annotated[Inner | None, ShortForm("text")] = None

    class LongerRecipe(Recipe):
        sparsify: Longer | None = None

    def planned(**more: Any) -> Step:
        raw["sparsify"]["more"] = {"text": str(file), **more}
        return make_plan(LongerRecipe.parse(raw), registry, Digests(), LAYOUTS).step("sparsify")

    kept = ("schema", "name", "model", "calibration", "sparsify")
    raw = copy.deepcopy({key: raw[key] for key in kept})
    file = tmp_path / "a.txt"
    file.write_text("first")
    first = planned()
    assert first.files.keys() == first.digests.keys() == {"calibration", "more.text"}
    assert planned(logs="elsewhere", verbose=True).fingerprint == first.fingerprint
    assert planned(power=2).fingerprint != first.fingerprint
    file.write_text("second")
    assert planned().fingerprint != first.fingerprint


def test_a_plan_finds_the_files(recipe: MarkedRecipe, tmp_path: Path) -> None:
    assert recipe.more is not None
    resolver = Resolver(recipe, Registry(), Digests(), LAYOUTS)
    known = len(resolver.problems)
    files = resolver.files(recipe.more, "more")
    assert set(files.values()) == {tmp_path / name for name in ("a.txt", "b.txt", "c.txt", "d.txt")}
    (tmp_path / "c.txt").unlink()
    resolver.files(recipe.more, "more")
    (problem,) = resolver.problems[known:]
    assert str(problem) == f"more.several.1.text: there is no file {tmp_path / 'c.txt'}"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("more.one.power=2", ("one",)),
        ("more.several.0.power=2", ("several", 0)),
        ("more.perhaps.power=2", ("perhaps",)),
    ],
)
def test_a_change_expands_a_short_form(change: str, place: tuple[Any, ...]) -> None:
    raw: dict[str, Any] = {"more": {"one": "a.txt", "several": ["a.txt"], "perhaps": "a.txt"}}
    apply(raw, change, "r.json", MarkedRecipe)
    here = raw["more"]
    for part in place:
        here = here[part]
    assert here == {"text": "a.txt", "power": 2}


def test_a_starting_recipe_names_files_from_its_own_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    preset = presets.PIPELINES["sparsify"]
    sections = {**preset.sections, "more": {"one": "a.txt"}}
    changed = type(preset)(**{**vars(preset), "sections": sections})
    monkeypatch.setattr(presets, "PIPELINES", {"sparsify": changed})
    monkeypatch.setattr(presets, "Recipe", MarkedRecipe)
    raw = presets.starting_recipe("sparsify", tmp_path / "recipes" / "r.json", data=str(tmp_path / "mine"))
    assert raw["more"] == {"one": str(tmp_path / "mine" / "a.txt")}


# -- the pieces ---------------------------------------------------------------------------------


def test_a_short_form_is_validated_and_described() -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Annotated[Inner, ShortForm("text")])
    assert adapter.validate_python("a") == adapter.validate_python({"text": "a"}) == Inner(text="a")
    with pytest.raises(ValidationError):
        adapter.validate_python(3)
    assert {"type": "string"} in adapter.json_schema()["anyOf"]


def test_what_a_field_holds() -> None:
    fields = fields_of(More)
    assert [section_in(field) for field in fields.values()] == [Inner] * 3
    assert {short_form_of(field) for field in fields.values()} == {ShortForm("text")}
    assert section_in(fields_of(Inner)["text"]) is short_form_of(fields_of(Inner)["text"]) is None


def test_keys_are_those_that_a_recipe_uses() -> None:
    class Aliased(BaseModel):
        value: int = Field(alias="the-value")

    assert list(fields_of(Aliased)) == ["the-value"]


@pytest.mark.parametrize(
    ("kind", "value", "valid"),
    [(Fraction, 0, True), (Fraction, 0.99, True), (Fraction, 1, False), (Count, 1, True), (Count, 0, False)],
)
def test_ranges(kind: Any, value: Any, valid: bool) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(kind)
    if valid:
        assert adapter.validate_python(value) == value
    else:
        with pytest.raises(ValidationError):
            adapter.validate_python(value)
