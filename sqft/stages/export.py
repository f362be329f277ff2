"""Give the finished model to an exporter, and check what it wrote."""

from __future__ import annotations

import shutil
from functools import cached_property
from pathlib import Path

from sqft.components.kinds import Exporter
from sqft.errors import ArtifactError, ContractError
from sqft.kernels.finite import all_finite
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.stages.inputs import Report, StageInputs


class ExportStage:
    """The stage `export`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs, self.folder = inputs, inputs.scratch / "model"
        self.exporter, self.label = inputs.step.component(Exporter), inputs.step.label(Exporter)

    @cached_property
    def model(self) -> FinishedModel:
        """The model that the step before made, or the recipe's own GPTQ checkpoint."""
        made = [folder / "model" for folder in self.inputs.folders.values()]
        spec = self.inputs.plan.spec(made[0] if made else self.inputs.plan.source.path)
        return FinishedModel(spec.path, spec.trust_remote_code)

    def run(self) -> Report:
        """Write `model/` in the exporter's format."""
        shutil.rmtree(self.folder, ignore_errors=True)  # left by an earlier attempt that was killed
        self.folder.mkdir()
        before = _file_states(self.model.folder)
        self.exporter.export(self.model, self.folder)
        if changed := [path for path, _ in before ^ _file_states(self.model.folder)]:
            raise ContractError(
                f"{self.label} changed {min(changed)}, a part of the model it was to export; "
                + ("make that again with --fresh" if self.inputs.folders else "copy the model again")
            )
        return {"exporter": self.exporter.name}

    def verify(self) -> None:
        """Check that something was written, that its tensors are finite, and that those which kept their names have
        the zeros they had."""
        if not any(self.folder.iterdir()):
            raise ArtifactError(f"export ({self.label}) wrote nothing")
        written, names = FolderReader(self.folder), {*self.model.names(), *self.model.floats()}
        try:
            written.names()
        except ArtifactError as error:
            raise ArtifactError(f"export ({self.label}): {error}") from None
        for name, tensor in written.tensors():
            if tensor.is_floating_point() and not all_finite(tensor):
                raise ArtifactError(
                    f"export ({self.label}): {name} holds values that are not finite as {tensor.dtype}; "
                    "export a wider precision"
                )
            if name not in names or tensor.shape != (original := self.model.tensor(name)).shape:
                continue
            if lost := int(((original == 0) & (tensor != 0)).sum()):
                raise ArtifactError(f"export ({self.label}): {lost} zeros of {name} are not zero any more")


def _file_states(folder: Path) -> set[tuple[Path, tuple[int, int, int]]]:
    """Return size, time of modification and inode of every file below a folder: a file written to differs in one."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {(file, ((state := file.stat()).st_size, state.st_mtime_ns, state.st_ino)) for file in files}
