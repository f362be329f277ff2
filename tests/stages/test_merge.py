"""What a merge computes, and how it compares the merged model with the one that was trained."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sqft_gptq.solver import round_to_nearest
from sqft_nls.adapter import Nls
from sqft_sparsepeft import QASparsePEFT, SparsePEFT
from torch import Tensor, nn

from sqft import Orchestrator, Recipe, Registry
from sqft.api import LinearShape, Merger
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize
from sqft.modeling.adapters.adapted_linear import MergedLinear, adapt
from sqft.modeling.adapters.frozen_weight import FloatWeight, FrozenWeight
from sqft.stages.inputs import StageInputs
from sqft.stages.merge import MergeStage, effective_weights


def sparse(out: int = 16, inputs: int = 64) -> tuple[Tensor, Tensor]:
    """A weight with zeros, and what is kept."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(out, inputs, generator=generator) < 0.5
    return torch.randn(out, inputs, generator=generator) * kept, kept


def adapted(base: FrozenWeight, merger: Merger) -> Any:
    """A model of one adapted layer, of which a merge needs no more."""
    shape = LinearShape("l", base.out_features, base.in_features)
    delta = Nls(ranks=(3,), alpha=6.0).delta(shape, torch.Generator().manual_seed(1))
    assert isinstance(delta, nn.Module)
    delta.B.data.normal_(generator=torch.Generator().manual_seed(2)).mul_(0.3)  # type: ignore[union-attr, operator]
    layer = adapt(base, None, delta, merger)
    assert isinstance(layer, MergedLinear)
    return SimpleNamespace(mergeable={"l": layer}, layers={"l": layer})


def test_floats_have_an_effective_weight_and_no_codes() -> None:
    weight, kept = sparse()
    model = adapted(FloatWeight(weight, True), SparsePEFT())
    effective, codes = effective_weights(model)
    assert codes == {} and effective["l"].equal(model.mergeable["l"].effective())
    assert not effective["l"][~kept].any() and not effective["l"].equal(weight)


def test_on_a_grid_the_effective_weight_is_what_its_codes_stand_for() -> None:
    weight, kept = sparse()
    grid = round_to_nearest(weight, kept, 4, 32, True, False).grid
    model = adapted(FloatWeight(weight, True, grid), QASparsePEFT())
    effective, codes = effective_weights(model)
    assert effective["l"].equal(dequantize(codes["l"])) and effective["l"].equal(model.mergeable["l"].effective())


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
