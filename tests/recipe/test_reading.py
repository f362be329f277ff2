"""A recipe file as plain data: strict JSON, and the changes of --set."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sqft import Recipe
from sqft.errors import RecipeError
from sqft.recipe.reading import apply, read_json


def test_a_file_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b'\xef\xbb\xbf{"a": [1, 2.5, null], "b": {"a": 1}}')
    assert read_json(tmp_path / "r.json") == {"a": [1, 2.5, None], "b": {"a": 1}}


@pytest.mark.parametrize(
    ("content", "place", "message"),
    [
        (b'{"a":\n 1,}', "line 2, column 4", "not valid JSON: .*double quotes"),
        (b'{"a": {"b": 1, "b": 2}}', "", "the key 'b' appears twice"),
        (b"[Infinity]", "", "Infinity is not a valid JSON number"),
        (b"1" * 1001, "", "1111111111… is a number of 1001 digits"),
        (b"[" * 100_000, "", "nested too deeply"),
        (b"\xff", "", "is not UTF-8 text"),
        (None, "", "cannot be read: No such file"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_problem(
    tmp_path: Path, content: bytes | None, place: str, message: str
) -> None:
    file = tmp_path / "r.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        read_json(file)
    (problem,) = caught.value.problems
    assert problem.place == place and caught.value.source == str(file)


def test_the_longest_number_that_is_read(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_bytes(b"1" * 1000)
    assert read_json(tmp_path / "r.json") == int("1" * 1000)


RAW: dict[str, Any] = {
    "name": "x",
    "model": {"path": "m"},
    "sparsify": {"scorer": "wanda"},
    "finetune": {"data": ["a.jsonl", {"path": "b.jsonl"}]},
    "evaluate": {"of": ["model", "merge"]},
}


@pytest.mark.parametrize(
    ("change", "path", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("name=other", ("name",), "other"),
        ('name="3"', ("name",), "3"),
        ("name=a=b", ("name",), "a=b"),
        ("name=", ("name",), ""),
        ("name=NaN", ("name",), "NaN"),
        ("sparsify.scorer=ria", ("sparsify", "scorer"), "ria"),
        ("sparsify.scorer.options.power=0.5", ("sparsify", "scorer"), {"name": "wanda", "options": {"power": 0.5}}),
        ("quantize.quantizer.name=rtn", ("quantize",), {"quantizer": {"name": "rtn"}}),
        ("finetune.data.0.weight=2", ("finetune", "data", 0), {"path": "a.jsonl", "weight": 2}),
        ("finetune.data.1.weight=2", ("finetune", "data", 1), {"path": "b.jsonl", "weight": 2}),
        ("finetune.validation.path=v", ("finetune", "validation"), {"path": "v"}),
        ("evaluate.of.1=search", ("evaluate", "of"), ["model", "search"]),
        ("new.key.inside=[1]", ("new",), {"key": {"inside": [1]}}),
    ],
)
def test_a_change(change: str, path: tuple[str | int, ...], value: Any) -> None:
    raw = copy.deepcopy(RAW)
    apply(raw, change, "r.json", Recipe)
    here: Any = raw
    for part in path:
        here = here[part]
    assert here == value


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        ("seed", "", "--set takes path=value, found 'seed'"),
        ("=1", "", "--set takes path=value"),
        ("name.x.y=1", "name.x", "there is no such path in the recipe"),
        ("evaluate.of.9=merge", "evaluate.of.9", "there is no such path in the recipe"),
        ("evaluate.of.-1=merge", "evaluate.of.-1", "there is no such path in the recipe"),
        ("evaluate.of.²=merge", "evaluate.of.²", "there is no such path in the recipe"),
        ("evaluate.of.x.y=merge", "evaluate.of.x", "there is no such path in the recipe"),
        ("finetune.data.2.weight=1", "finetune.data.2", "there is no such path in the recipe"),
    ],
)
def test_a_change_that_leads_nowhere(change: str, place: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        apply(copy.deepcopy(RAW), change, "r.json", Recipe)
    (problem,) = caught.value.problems
    assert problem.place == place


@pytest.mark.parametrize("raw", [None, 3, [], "x"])
def test_a_change_of_what_is_no_object(raw: Any) -> None:
    with pytest.raises(RecipeError, match="there is no such path in the recipe"):
        apply(raw, "name=x", "r.json", Recipe)


def test_a_recipe_in_yaml_is_no_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError, match=r"not valid JSON: .*; recipes are JSON, and YAML is not read"):
        read_json(tmp_path / "r.yaml")
