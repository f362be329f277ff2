"""Every stage of a recipe can be made, and making one is what imports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.recipe.stages import STAGES
from sqft.stages.inputs import StageInputs
from sqft.stages.stage import MAKERS, make_stage


def test_the_table_has_the_stages_of_a_recipe() -> None:
    assert list(MAKERS) == [stage.name for stage in STAGES]


@pytest.fixture
def all_stages(raw: dict[str, Any]) -> dict[str, Any]:
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["export"] = [{"exporter": "hf"}]
    return raw


def test_each_is_made_from_its_step(all_stages: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(all_stages))
    made = set()
    for step in plan.steps:
        folders = {role: tmp_path / name for role, name in step.inputs.items()}
        stage = make_stage(StageInputs(plan, step, folders, tmp_path / "scratch", "cpu"))
        assert type(stage).__name__ == f"{step.stage.capitalize()}Stage"
        assert callable(stage.run) and callable(stage.verify)
        made.add(step.stage)
    assert made == MAKERS.keys() and not (tmp_path / "scratch").exists()  # nothing is written before `run`


def test_the_interface_and_the_data_of_a_step_import_no_torch() -> None:
    code = "import sys, sqft.stages.stage; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
