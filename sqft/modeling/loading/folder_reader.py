"""A model folder's tensors, read one at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sqft.errors import ArtifactError

PRECISIONS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The precisions of floats, as headers of safetensors files name them."""
PIECE = 1 << 26
"""Bytes of a tensor that are read at once, where it need not be there as a whole."""


@dataclass(frozen=True)
class FolderReader:
    """A model folder's tensors, read one at a time from its safetensors files, or from some of them.

    Raises:
        ArtifactError: when a file is damaged or a tensor is missing; the message names it.
    """

    folder: Path
    only: Collection[Path] | None = None

    def names(self) -> Sequence[str]:
        """Return the names of all tensors, sorted."""
        return sorted(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    @property
    def coded(self) -> frozenset[str]:
        """The tensors that are stored as codes: weights [out, in], also of a model that stores them as [in, out]."""
        return frozenset()

    def tensor(self, name: str) -> Tensor:
        """Read one tensor."""
        file = self._files.get(name)
        if file is None:
            raise ArtifactError(f"{self.folder} has no tensor {name}")
        with _open(file) as stream:
            tensor: Tensor = stream.get_tensor(name)
        return tensor

    def pieces(self, name: str, size: int = PIECE) -> Iterator[Tensor]:
        """Read a tensor a piece of its rows after the other, in order: no more than one row or `size` bytes is held."""
        start, rows = 0, 1
        while start < rows:
            with _open(self._files[name]) as stream:  # what was read of a file is held as long as it is open
                stored = stream.get_slice(name)
                rows = next(iter(stored.get_shape()), 0)
                step = max(1, size // max(1, stored[:1].nbytes)) if rows else 1
                piece: Tensor = stored[start : start + step] if rows else stream.get_tensor(name)
            yield piece
            start += step

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Read all tensors, in the order of their names, each with its name; every file is opened once."""
        with ExitStack() as stack:
            streams = {file: stack.enter_context(_open(file)) for file in sorted(set(self._files.values()))}
            for name, file in sorted(self._files.items()):
                yield name, streams[file].get_tensor(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, from its file's header."""
        return self._headers[name][0]

    @cached_property
    def precisions(self) -> dict[str, torch.dtype]:
        """The precision of each tensor of floats, from the headers alone."""
        return {name: PRECISIONS[dtype] for name, (_, dtype) in self._headers.items() if dtype in PRECISIONS}

    @cached_property
    def _headers(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """The shape and precision of each tensor as its file's header has them; every file is opened once."""
        found: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in sorted(set(self._files.values())):
            with _open(file) as stream:
                stored = {name: stream.get_slice(name) for name in stream.keys()}  # noqa: SIM118
                found |= {name: (tuple(one.get_shape()), one.get_dtype()) for name, one in stored.items()}
        return found

    @cached_property
    def _files(self) -> dict[str, Path]:
        """The file of each tensor; a reader lists its folder once."""
        files: dict[str, Path] = {}
        for file in sorted(self.folder.glob("*.safetensors") if self.only is None else self.only):
            with _open(file) as stream:
                files.update(dict.fromkeys(stream.keys(), file))
        return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} is not a complete safetensors file: {error}") from None
