"""The hidden states that calibration carries from block to block: in memory up to a limit, and beyond it in a file."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import IO

import torch
from torch import Tensor


class HiddenStates:
    """The hidden states of all windows, by number; each keeps its size.

    Args:
        limit: bytes that are kept in memory; the states of the first windows are.
        folder: where the file of the others is; without a name of its own, it is gone when the process ends.
    """

    def __init__(self, limit: int = sys.maxsize, folder: Path | None = None) -> None:
        self._limit, self._folder = limit, folder
        self._kept: list[Tensor] = []
        self._spilled: list[Tensor] = []
        """On the meta device: the shape and type of each state in the file."""
        self._file: IO[bytes] | None = None

    def append(self, state: Tensor) -> None:
        """Add the states of one more window."""
        if not self._spilled and sum(kept.nbytes for kept in self._kept) + state.nbytes <= self._limit:
            self._kept.append(state)
        else:
            self._spilled.append(state.to("meta"))
            self[len(self._kept) + len(self._spilled) - 1] = state

    def __getitem__(self, index: int) -> Tensor:
        if index < len(self._kept):
            return self._kept[index]
        like = self._spilled[index - len(self._kept)]
        octets = bytearray(self._at(index).read(like.nbytes))
        return torch.frombuffer(octets, dtype=torch.uint8).view(like.dtype).view(like.shape)

    def __setitem__(self, index: int, state: Tensor) -> None:
        if index < len(self._kept):
            self._kept[index] = state
            return
        self._at(index).write(state.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def _at(self, index: int) -> IO[bytes]:
        """Return the file at the place of a window's states."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115
        self._file.seek(sum(like.nbytes for like in self._spilled[: index - len(self._kept)]))
        return self._file
