"""What a sweep's file says: cells, their settings, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.errors import RecipeError
from sqft.tools.sweep import Sweep

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
    cells = Sweep.parse(RAW, tmp_path).cells(["seed=7"])
    assert [cell.name for cell in cells[:3]] == ["s-LoRA-0.3-0", "s-LoRA-0.3-1", "s-LoRA-0.5-0"] and len(cells) == 8
    first, last = cells[0], cells[-1]
    assert first.values == {"adapter": "LoRA", "sparsify.sparsity": "0.3", "seed": "0"}
    assert str(first) == "adapter LoRA, sparsify.sparsity 0.3, seed 0"
    assert first.recipe == tmp_path / "a.json" and last.recipe == tmp_path / "b.json"
    assert first.changes == (
        "finetune.steps=9", 'finetune.adapter="lora"', "sparsify.sparsity=0.3", "seed=0", "seed=7",
        'name="s-LoRA-0.3-0"',
    )  # fmt: skip
    assert last.changes == ("finetune.steps=3", "sparsify.sparsity=0.5", "seed=1", "seed=7", 'name="s-other-0.5-1"')


def test_cells_that_are_left_out() -> None:
    raw = RAW | {"skip": [{"adapter": "other", "sparsify.sparsity": 0.3}, {"seed": 1, "adapter": "LoRA"}]}
    assert [cell.name for cell in Sweep.parse(raw).cells()] == [
        "s-LoRA-0.3-0", "s-LoRA-0.5-0", "s-other-0.5-0", "s-other-0.5-1",
    ]  # fmt: skip


def test_names_are_folders_names() -> None:
    raw = {
        "name": "s",
        "recipe": "a.json",
        "axes": {"finetune.data": ["x/y z.jsonl"], "search": {"": {"search": None}}},
    }
    (cell,) = Sweep.parse(raw).cells()
    assert cell.name == "s-x-y-z.jsonl" and cell.changes[1] == "search=null"


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
