"""Hand the finished model to an exporter, and look at what it wrote."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from sqft.components.kinds import Exporter
from sqft.errors import ArtifactError, ContractError
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.stages.context import Context


def run(context: Context) -> dict[str, Any]:
    """Write `model/` as the exporter's runtime wants it."""
    folder = context.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed try left
    folder.mkdir()
    model = _model(context)
    before = _states(model.folder)
    context.component(Exporter).export(model, folder)
    if odd := [place for place, state in before ^ _states(model.folder)]:
        raise ContractError(
            f"{context.label(Exporter)} changed {min(odd)}, a part of the model it was to export; "
            + ("make that again with --fresh" if context.inputs else "copy the model again")
        )
    return {"exporter": context.component(Exporter).name}


def verify(context: Context) -> None:
    """Something was written; tensors that kept their names are whole, finite and no denser."""
    folder, label = context.folder / "model", context.label(Exporter)
    if not any(folder.iterdir()):
        raise ArtifactError(f"export ({label}) wrote nothing")
    source, written = _model(context), FolderReader(folder)
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


def _model(context: Context) -> FinishedModel:
    """What the step before made, or the recipe's own GPTQ checkpoint."""
    made = [folder / "model" for folder in context.inputs.values()]
    return FinishedModel(made[0] if made else context.plan.source.path)
