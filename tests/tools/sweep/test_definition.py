"""What a sweep's file says: cells, their settings, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.errors import RecipeError
from sqft.tools.sweep import Sweep
from sqft.tools.sweep.definition import short_digest

RAW: dict[str, Any] = {
    "name": "s",
    "recipe": "a.json",
    "set": {"finetune.steps": 9},
    "axes": {
        "adapter": {"LoRA": {"finetune.adapter": "lora"}, "other": {"recipe": "b.json", "finetune.steps": 3}},
        "sparsify.sparsity": [0.3, 0.5],
        "seed": [0, 1],
    },
}


def test_a_cell_for_each_combination(tmp_path: Path) -> None:
    cells = Sweep.parse(RAW, tmp_path).cells(["merge={}"])
    own = short_digest(["merge={}"])  # the runs of the file's own settings keep their names
    names = ["LoRA-0.3-0", "LoRA-0.3-1", "LoRA-0.5-0"]
    assert [cell.name for cell in cells[:3]] == [f"s-{own}-{name}" for name in names] and len(cells) == 8
    assert [cell.name for cell in Sweep.parse(RAW, tmp_path).cells()[:3]] == [f"s-{name}" for name in names]
    first, last = cells[0], cells[-1]
    assert first.values == {"adapter": "LoRA", "sparsify.sparsity": "0.3", "seed": "0"}
    assert str(first) == "adapter LoRA, sparsify.sparsity 0.3, seed 0"
    assert first.recipe == tmp_path / "a.json" and last.recipe == tmp_path / "b.json"
    assert first.changes == (
        "finetune.steps=9", 'finetune.adapter="lora"', "sparsify.sparsity=0.3", "seed=0", "merge={}",
        f'name="s-{own}-LoRA-0.3-0"',
    )  # fmt: skip
    assert last.changes == (
        "finetune.steps=3",
        "sparsify.sparsity=0.5",
        "seed=1",
        "merge={}",
        f'name="s-{own}-other-0.5-1"',
    )


def test_cells_that_are_left_out() -> None:
    raw = RAW | {"skip": [{"adapter": "other", "sparsify.sparsity": 0.3}, {"seed": 1, "adapter": "LoRA"}]}
    assert [cell.name for cell in Sweep.parse(raw).cells()] == [
        "s-LoRA-0.3-0", "s-LoRA-0.5-0", "s-other-0.5-0", "s-other-0.5-1",
    ]  # fmt: skip


def test_each_run_has_a_name_of_its_own() -> None:
    """Plain where the values are, else with a digest: signs that a folder cannot have, long ones, and the same ones."""

    def names(**axes: Any) -> list[str]:
        return [cell.name for cell in Sweep.parse({"name": "s", "recipe": "a.json", "axes": axes}).cells()]

    assert names(data=["x/y.jsonl", "z"]) == ["s-x-y.jsonl", "s-z"]
    for axes in (
        {"a": ["x y", "x/y", "x-y"]},
        {"a": ["é", "ü", ""]},
        {"a": ["p", "p-q"], "b": ["r", "q-r"]},
        {"a": ["x" * 300, "x" * 299]},
    ):
        found = names(**axes)
        assert len(set(found)) == len(found) and all(0 < len(name) < 120 and name.isascii() for name in found), found


def test_an_axis_comes_before_what_is_set_inside_it() -> None:
    raw = {
        "name": "s",
        "recipe": "a.json",
        "set": {"sparsify.sparsity": 0.1, "sparsify": {"scorer": "wanda"}, "merge": {}},
    }
    (cell,) = Sweep.parse(raw | {"axes": {"sparsify": [{"sparsity": 0.5}]}}).cells()
    assert cell.changes[:2] == ("merge={}", 'sparsify={"sparsity": 0.5}')


@pytest.mark.parametrize("change", ["seed=7", "sparsify=null", "sparsify.sparsity=0.1", "finetune.adapter.name=lora"])
def test_what_an_axis_sets_cannot_be_changed_in_all_cells(change: str) -> None:
    with pytest.raises(RecipeError, match=f"sets what --set {change.partition('=')[0]} changes, too"):
        Sweep.parse(RAW).cells([change])
    with pytest.raises(RecipeError) as caught:
        Sweep.parse(RAW).cells(["name=other", "recipe=b.json", change])
    assert [one.place for one in caught.value.problems][:2] == ["name", "recipe"] and len(caught.value.problems) == 3


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"axes": {}}, "axes: "),
        ({"axes": {"seed": []}}, "axes.seed: has no values"),
        ({"axes": {"seed": [0, 0]}}, "axes.seed: has 0 twice"),
        ({"axes": {"sparsity": [0.5]}}, "axes.sparsity: is what results call something else"),
        ({"recipe": None}, "recipe: is missing; name a recipe file, here or for each value of an axis"),
        ({"skip": [{"seed": 3}]}, "skip.0.seed: no axis 'seed' has the value 3"),
        ({"skip": [{"sed": 0}]}, "skip.0.sed: no axis 'sed' has the value 0"),
        ({"name": "a/b"}, "name: "),
        ({"axis": {}}, "axis: "),
        ({"axes": {"a": 5}}, "axes.a: expected a list of values"),
        ({"axes": {"a": {"x": 5}}}, "axes.a.x: expected an object"),
        ({"axes": {"a": {"x": {"recipe": None}}}}, "axes.a.x.recipe: expected the path"),
        ({"axes": {"a": {"x": {"name": "y"}}}}, "axes.a.x.name: is made of the sweep's name"),
        ({"axes": {"": [1]}}, "axes.: is no name of an axis"),
        ({"axes": {"name": ["a"]}}, "axes.name: is what results call something else"),
        ({"axes": {"seed": {"a": {"seed": 1}}}}, "axes.seed: is the axis of seeds"),
        ({"axes": {"a": {"x": {"seed": 1}}, "seed": [0]}}, "axes.seed: sets seed, as the axis a does"),
        ({"axes": {"a": {"x": {"finetune": None}}, "finetune.steps": [1]}}, "axes.finetune.steps: sets finetune, as"),
        ({"set": {"recipe": "b.json"}}, "set.recipe: has a place of its own"),
        ({"set": {"finetune.steps=3": 4}}, "set.finetune.steps=3: is no place in a recipe"),
        ({"axes": {"a": {"x": {"seed=1": 1}}}}, "axes.a.x.seed=1: is no place in a recipe"),
        ({"recipe": ""}, "recipe: "),
    ],
)
def test_mistakes(changes: dict[str, Any], problem: str, tmp_path: Path) -> None:
    file = tmp_path / "sweep.json"
    file.write_text(json.dumps(RAW | changes))
    with pytest.raises(RecipeError) as caught:
        Sweep.load(file)
    assert any(str(one).startswith(problem) for one in caught.value.problems), caught.value
    assert str(caught.value).startswith(str(file))


def test_an_axis_may_name_all_recipes(tmp_path: Path) -> None:
    axes = {"pipeline": {"one": {"recipe": "a.json"}, "two": {"recipe": "b.json"}}}
    cells = Sweep.parse({"name": "s", "axes": axes}, tmp_path).cells()
    assert [cell.recipe.name for cell in cells] == ["a.json", "b.json"]
    with pytest.raises(RecipeError, match="expected a JSON object, found list"):
        Sweep.parse([])
