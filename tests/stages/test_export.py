"""An export is checked against the model that it was made of."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import ArtifactError, ContractError
from sqft.stages.export import ExportStage
from sqft.stages.inputs import StageInputs

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def stage(raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path) -> ExportStage:
    """The exporter `hf` on a copy of the tiny model with some zeros, as if `sparsify` had made it."""
    raw = {"name": "x", "model": raw["model"], "sparsify": {"scorer": "magnitude"}, "export": [{"exporter": "hf"}]}
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    step = next(step for step in plan.steps if step.stage == "export")
    shutil.copytree(model_folder, tmp_path / "made" / "model")
    weights = tmp_path / "made" / "model" / "model.safetensors"
    tensors = load_file(weights)
    tensors[UP][0, :5] = 0
    save_file(tensors, weights, {"format": "pt"})
    folders = dict.fromkeys(step.inputs, tmp_path / "made")
    (tmp_path / "scratch").mkdir()
    return ExportStage(StageInputs(plan, step, folders, tmp_path / "scratch", "cpu"))


def edit(folder: Path, **values: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors[name.replace("__", ".")].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_it_writes_the_model_and_passes(stage: ExportStage) -> None:
    assert stage.run() == {"exporter": "hf"}
    stage.verify()
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (stage.model.folder, stage.folder))
    assert all(theirs[name].equal(value) for name, value in ours.items())


def test_a_model_that_is_not_finite_is_not_exported(stage: ExportStage) -> None:
    edit(stage.model.folder, **{UP.replace(".", "__"): float("nan")})
    with pytest.raises(ArtifactError, match=rf"{UP} holds values that are not finite"):
        stage.run()
    assert not list(stage.folder.glob("*.safetensors"))


def test_what_an_earlier_attempt_left_is_removed(stage: ExportStage) -> None:
    stage.folder.mkdir()
    (stage.folder / "model-00009-of-00009.safetensors").write_bytes(b"cut short")
    stage.run()
    stage.verify()
    assert not list(stage.folder.glob("*-00009*"))


def test_an_export_of_nothing(stage: ExportStage) -> None:
    stage.run()
    shutil.rmtree(stage.folder)
    stage.folder.mkdir()
    with pytest.raises(ArtifactError, match=r"export \(exporter 'hf' .*\) wrote nothing"):
        stage.verify()


@pytest.mark.parametrize(
    ("value", "message"),
    [(1.0, f"1 zeros of {UP} are not zero any more"), (float("nan"), f"{UP} holds values that are not finite as")],
)
def test_an_export_of_other_values(stage: ExportStage, value: float, message: str) -> None:
    stage.run()
    edit(stage.folder, **{UP.replace(".", "__"): value})
    with pytest.raises(ArtifactError, match=message):
        stage.verify()


def test_an_exporter_that_edits_its_model(stage: ExportStage) -> None:
    class Careless:
        name = "careless"

        def export(self, model: Any, folder: Path) -> None:
            (model.folder / "config.json").write_text("{}")

    stage.exporter = Careless()  # type: ignore[assignment]
    with pytest.raises(ContractError, match=r"changed .*config\.json, a part of the model .* with --fresh"):
        stage.run()
