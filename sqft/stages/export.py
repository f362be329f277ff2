"""Hand the finished model to an exporter, and look at what it wrote."""

from __future__ import annotations

import shutil
from typing import Any

from sqft.contracts import Exporter
from sqft.errors import ArtifactError
from sqft.modeling.load import FolderReader
from sqft.modeling.reader import FinishedModel
from sqft.stages.base import Context


def run(context: Context) -> dict[str, Any]:
    """Write `model/` as the exporter's runtime wants it."""
    folder = context.folder / "model"
    shutil.rmtree(folder, ignore_errors=True)  # what a killed try left
    folder.mkdir()
    context.component(Exporter).export(_model(context), folder)
    return {"exporter": context.component(Exporter).name}


def prove(context: Context) -> None:
    """Something was written; tensors that kept their names are whole, finite and no denser."""
    folder, who = context.folder / "model", context.who(Exporter)
    if not any(folder.iterdir()):
        raise ArtifactError(f"export ({who}) wrote nothing")
    source, written = _model(context), FolderReader(folder)
    known = set(source.names())
    for name, tensor in written.tensors():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ArtifactError(
                f"export ({who}): {name} holds values that are not finite as {tensor.dtype}; export a wider precision"
            )
        if name in known and tensor.shape == (original := source.tensor(name)).shape:
            lost = int(((original == 0) & (tensor != 0)).sum())
            if lost:
                raise ArtifactError(f"export ({who}): {lost} zeros of {name} are not zero any more")


def _model(context: Context) -> FinishedModel:
    (artifact,) = context.inputs.values()
    return FinishedModel(artifact.folder / "model")
