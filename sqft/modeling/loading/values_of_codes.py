"""A GPTQ folder, read as if it were a folder of floats: a layer's weight is the value of its codes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import read_object, weight_files
from sqft.kernels.grids import dequantize
from sqft.modeling.loading.folder_reader import PIECE, FolderReader
from sqft.modeling.loading.quantized import GptqFolder, precision_of, quantization_of


@dataclass(frozen=True)
class ValuesOfCodes(FolderReader):
    """The tensors that a GPTQ folder would hold if all its layers were floats.

    Args:
        dtype: the precision of the values; None takes that of the folder's floats.
    """

    dtype: torch.dtype | None = None

    def names(self) -> Sequence[str]:
        return sorted(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def tensor(self, name: str) -> Tensor:
        if name not in self.coded:
            return self._stored.reader.tensor(name)
        return dequantize(self._stored.layer(name.removesuffix(".weight"))).to(self._precision)

    def pieces(self, name: str, size: int = PIECE) -> Iterator[Tensor]:
        if name not in self.coded:
            return self._stored.reader.pieces(name, size)
        return iter([self.tensor(name)])  # a layer is small beside what lies outside the blocks

    def shape(self, name: str) -> tuple[int, ...]:
        if name not in self.coded:
            return self._stored.reader.shape(name)
        words, out = self._stored.reader.shape(f"{name.removesuffix('.weight')}.qweight")
        return out, words * 32 // self._stored.settings["bits"]

    @cached_property
    def precisions(self) -> dict[str, torch.dtype]:
        return {**self._floats, **dict.fromkeys(self.coded, self._precision)}

    @cached_property
    def _stored(self) -> GptqFolder:
        return GptqFolder(self.folder)

    @cached_property
    def _names(self) -> frozenset[str]:
        return self.coded | set(self._stored.other_names())

    @cached_property
    def coded(self) -> frozenset[str]:
        return frozenset(f"{name}.weight" for name in self._stored.layers)

    @cached_property
    def _floats(self) -> dict[str, torch.dtype]:
        """The precision of each tensor that is no part of a quantized layer."""
        precisions = self._stored.reader.precisions
        return {name: precisions[name] for name in self._stored.other_names() if name in precisions}

    @cached_property
    def _precision(self) -> torch.dtype:
        if self.dtype is not None:
            return self.dtype
        config = read_object(self.folder / "config.json")
        stated = config.get("dtype") or config.get("torch_dtype")
        return precision_of(getattr(torch, stated) if stated else None, self._floats.values())


def reader_of_floats(spec: ModelSpec) -> FolderReader:
    """Return what reads a folder's tensors as floats, codes too."""
    if quantization_of(spec.path) is None:
        return FolderReader(spec.path, weight_files(spec.path))
    return ValuesOfCodes(spec.path, dtype=getattr(torch, spec.dtype) if spec.dtype else None)
