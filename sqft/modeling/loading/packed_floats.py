"""Read a folder of MXFP4 or FP8 as the floats that it stands for, one tensor at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from sqft.checkpoints.packed_floats import PackedFloats, packed_floats
from sqft.checkpoints.safetensors import weight_files
from sqft.errors import ArtifactError
from sqft.kernels.packed_floats import from_float8, from_mxfp4
from sqft.modeling.loading.folder_reader import FolderReader

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


class FloatTensor:
    """A tensor that is read and dequantized when transformers asks for its values, as of a slice of a file."""

    def __init__(self, reader: FolderReader, packed: PackedFloats, parts: tuple[str, ...], dtype: torch.dtype) -> None:
        self._reader, self._packed, self._parts, self._dtype = reader, packed, parts, dtype

    def __getitem__(self, _: object) -> Tensor:
        tensors = [self._reader.tensor(part) for part in self._parts]
        if len(tensors) == 1:
            if tensors[0].dtype in FLOAT8:
                raise ArtifactError(f"{self._reader.folder}: {self._parts[0]} is float8 without a scale")
            return tensors[0]  # in the precision it has; some models keep some in float32
        codes, scales = tensors
        if self._packed.method == "mxfp4":
            return _in_parts(codes, scales, self._dtype)
        if codes.dtype not in FLOAT8:
            dtype = str(codes.dtype).removeprefix("torch.")
            raise ArtifactError(f"{self._reader.folder}: {self._parts[0]} has scales and is {dtype}, expected float8")
        return from_float8(codes, scales, self._packed.block).to(self._dtype)


def read_packed_floats(folder: Path, dtype: torch.dtype) -> dict[str, FloatTensor]:
    """Return the tensors that a folder of MXFP4 or FP8 stands for, by name; none is read yet. What is
    packed comes in `dtype`.

    Raises:
        ArtifactError: when the folder is not packed, or a part of a tensor is missing.
    """
    packed = packed_floats(json.loads((folder / "config.json").read_text("utf-8")))
    if packed is None:
        raise ArtifactError(f"{folder} holds no weights in MXFP4 or FP8")
    reader = FolderReader(folder, weight_files(folder))
    return {
        name: FloatTensor(reader, packed, parts, dtype) for name, parts in sorted(packed.parts(reader.names()).items())
    }


def _in_parts(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Dequantize MXFP4 one expert at a time: [experts, rows, n, 16] becomes [experts, 32 · n, rows], as transformers
    has it."""
    experts, rows, count, half = blocks.shape
    floats = torch.empty(experts, 2 * half * count, rows, dtype=dtype)
    for index in range(experts):
        floats[index] = from_mxfp4(blocks[index], scales[index]).T.to(dtype)
    return floats
