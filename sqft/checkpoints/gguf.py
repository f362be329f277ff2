"""GGUF files of Llama models, read by their headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.safetensors import FLOATS, precision_of_most
from sqft.errors import ArtifactError, ModelError
from sqft.utils.digests import Digests

GGUF_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""The names of a block's linear layers in GGUF, and in transformers."""

GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def gguf_source(path: Path, digests: Digests) -> ModelSource:
    """Return what the header of a GGUF file says of its model.

    Raises:
        ModelError: when the package gguf is not installed, or the file has no tensors.
        ArtifactError: when the file is damaged.
    """
    tensors = open_gguf(path).tensors
    shapes = {str(t.name): tuple(int(n) for n in reversed(t.shape)) for t in tensors}
    if not shapes:
        raise ModelError(f"{path} has no tensors, only a vocabulary or settings; name the file that holds the weights")
    codes = any(tensor.tensor_type.name not in FLOATS for tensor in tensors)
    dtype = "float32" if codes else precision_of_most((t.tensor_type.name, shapes[str(t.name)]) for t in tensors)
    return ModelSource("gguf", path, digests.file(path), shapes, dtype=dtype)


def module_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes [out, in] of the blocks' linear layers in a GGUF file, by their names in transformers."""
    matches = {name: GGUF_BLOCK.fullmatch(name) for name in shapes}
    return {
        f"model.layers.{match[1]}.{GGUF_LINEARS[match[2]]}": shapes[name]
        for name, match in matches.items()
        if match and match[2] in GGUF_LINEARS
    }


def open_gguf(path: Path) -> Any:
    """Open a GGUF file with the reader of the package gguf. The last one stays open, until it changes.

    Raises:
        ModelError: when the package is not installed.
        ArtifactError: when the file is damaged.
    """
    state = path.stat()
    return _opened(path, (state.st_mtime_ns, state.st_size, state.st_ino))


@lru_cache(maxsize=1)
def _opened(path: Path, _: tuple[int, ...]) -> Any:
    try:
        return gguf_reader()(path)
    except ImportError:
        raise ModelError("reading a GGUF file needs the package gguf: pip install 'sqft[gguf]'") from None
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path} is not a complete GGUF file: {error}; copy it again") from None


def gguf_reader() -> type:
    """Return the reader of the package gguf, three times as fast: it takes a slice of the file for each token of the
    vocabulary, and slices of a memory map are slow."""
    from gguf import GGUFReader
    from numpy import ndarray

    class Reader(GGUFReader):
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(ndarray)

    return Reader
