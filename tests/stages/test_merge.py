"""What a merge computes, and how it compares the merged model with the one that was trained."""

from __future__ import annotations

from pathlib import Path

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import ArtifactError
from sqft.stages.inputs import StageInputs
from sqft.stages.merge import MergeStage


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory, model_folder: Path, data: Path) -> MergeStage:
    """The stage after a whole run of it, on the tiny model."""
    folder = tmp_path_factory.mktemp("merge")
    raw = {
        "name": "tiny",
        "model": {"path": str(model_folder)},
        "sparsify": {"scorer": "magnitude"},
        "finetune": {
            "adapter": {"name": "lora", "options": {"rank": 4}}, "merger": "sparsepeft", "targets": ["q_proj"],
            "data": str(data / "train.jsonl"), "steps": 1, "batch_size": 2,
        },
        "merge": {},
    }  # fmt: skip
    orchestrator = Orchestrator(Registry.discover(), folder / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    run = orchestrator.run(plan, "search")
    step = plan.step("merge")
    (folder / "scratch").mkdir()
    made = MergeStage(StageInputs(plan, step, run.inputs("merge"), folder / "scratch", "cpu"))
    made.run()
    made.verify()
    return made


@pytest.mark.parametrize("change", ["edited", "deleted"])
def test_what_is_on_disk_is_proved(stage: MergeStage, change: str) -> None:
    """And not what the stage has in memory."""
    file = stage.folder / "model.safetensors"
    content = file.read_bytes()
    if change == "edited":
        file.write_bytes(content[:-4] + bytes(4))
    else:
        file.unlink()
    try:
        with pytest.raises(ArtifactError, match="has changed since it was read back"):
            stage.verify()
    finally:
        file.write_bytes(content)
    stage.verify()
