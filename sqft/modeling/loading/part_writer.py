"""A model folder that is written one part at a time, each into a file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import data_bytes, write_index
from sqft.modeling.architecture.linears import as_stored
from sqft.modeling.compat import reverted, without_tied
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.parts import WholeModel
from sqft.modeling.loading.transformers_io import as_in_source
from sqft.utils.files import written_whole


class PartWriter:
    """The weights of a folder in Hugging Face layout: a file for each part, and the index.

    Args:
        folder: is made.
        parts: all parts of the model, in order.
    """

    def __init__(self, folder: Path, parts: list[str]) -> None:
        self.folder = folder
        self.files = {
            part: folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number, part in enumerate(parts, 1)
        }
        """The file of each part."""

    def write(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Write the tensors of a part, by the names of its checkpoint, completely or not at all."""
        self.folder.mkdir(exist_ok=True)
        with written_whole(self.files[part]) as file:
            save_file({name: one.contiguous() for name, one in tensors.items()}, file, metadata={"format": "pt"})

    def reader(self, part: str) -> FolderReader:
        """Return a reader of the part as it was written."""
        return FolderReader(self.folder, [self.files[part]])

    def write_index(self) -> None:
        """Write the index, after all parts."""
        names = {file: FolderReader(self.folder, [file]).names() for file in self.files.values()}
        file_of = {name: file.name for file, of_file in names.items() for name in of_file}
        write_index(self.folder, file_of, sum(map(data_bytes, names)))


def float_tensors(opened: WholeModel, part: str, source: ModelSpec) -> dict[str, Tensor]:
    """Return the tensors of a part that is held, as `save_model` would write them.

    Args:
        opened: the model.
        part: one of its parts.
        source: what the model was loaded from; see `save_model`.
    """
    stored = without_tied(opened.model, as_stored(opened.model, state=opened.state(part)))
    return as_in_source(opened.model, reverted(opened.model, stored), source)
