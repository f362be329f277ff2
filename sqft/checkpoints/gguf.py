"""GGUF files of Llama models, read by their headers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqft.checkpoints.model_source import ModelSource
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
    shapes = {str(t.name): tuple(int(n) for n in reversed(t.shape)) for t in open_gguf(path).tensors}
    if not shapes:
        raise ModelError(f"{path} has no tensors, only a vocabulary or settings; name the file that holds the weights")
    return ModelSource("gguf", path, digests.file(path), shapes)


def module_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Return the shapes [out, in] of the blocks' linear layers in a GGUF file, by their names in transformers."""
    matches = {name: GGUF_BLOCK.fullmatch(name) for name in shapes}
    return {
        f"model.layers.{match[1]}.{GGUF_LINEARS[match[2]]}": shapes[name]
        for name, match in matches.items()
        if match and match[2] in GGUF_LINEARS
    }


def open_gguf(path: Path) -> Any:
    """Open a GGUF file with the reader of the package gguf.

    Raises:
        ModelError: when the package is not installed.
        ArtifactError: when the file is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise ModelError("reading a GGUF file needs the package gguf: pip install 'sqft[gguf]'") from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> ArtifactError:
    return ArtifactError(f"{path} is not a complete GGUF file: {error}; copy it again")
