"""Hand the finished model to an exporter, and look at what it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path

from sqft.components.kinds import Exporter
from sqft.errors import ArtifactError, ContractError
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.stages.inputs import Report, StageInputs


class ExportStage:
    """The stage `export`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> Report:
        return _run(self.inputs)

    def verify(self) -> None:
        _verify(self.inputs)


def _run(inputs: StageInputs) -> Report:
    """Write `model/` as the exporter's runtime wants it."""
    folder = inputs.scratch / "model"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed try left
    folder.mkdir()
    model = _model(inputs)
    before = _states(model.folder)
    inputs.component(Exporter).export(model, folder)
    if odd := [place for place, state in before ^ _states(model.folder)]:
        raise ContractError(
            f"{inputs.label(Exporter)} changed {min(odd)}, a part of the model it was to export; "
            + ("make that again with --fresh" if inputs.folders else "copy the model again")
        )
    return {"exporter": inputs.component(Exporter).name}


def _verify(inputs: StageInputs) -> None:
    """Something was written; tensors that kept their names are whole, finite and no denser."""
    folder, label = inputs.scratch / "model", inputs.label(Exporter)
    if not any(folder.iterdir()):
        raise ArtifactError(f"export ({label}) wrote nothing")
    source, written = _model(inputs), FolderReader(folder)
    known = set(source.names())
    try:
        written.names()
    except ArtifactError as error:
        raise ArtifactError(f"export ({label}): {error}") from None
    for name, tensor in written.tensors():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtifactError(
                f"export ({label}): {name} holds values that are not finite as {tensor.dtype}; export a wider precision"
            )
        if name in known and tensor.shape == (original := source.tensor(name)).shape:
            lost = int(((original == 0) & (tensor != 0)).sum())
            if lost:
                raise ArtifactError(f"export ({label}): {lost} zeros of {name} are not zero any more")


def _states(folder: Path) -> set[tuple[Path, tuple[int, int, int]]]:
    """What of every file below a folder shows that it was written to."""
    files = [place for place in folder.rglob("*") if place.is_file()]
    return {(file, ((state := file.stat()).st_size, state.st_mtime_ns, state.st_ino)) for file in files}


def _model(inputs: StageInputs) -> FinishedModel:
    """What the step before made, or the recipe's own GPTQ checkpoint."""
    made = [folder / "model" for folder in inputs.folders.values()]
    return FinishedModel(made[0] if made else inputs.plan.source.path)
