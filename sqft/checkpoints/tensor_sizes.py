"""Bytes of the tensors in a safetensors file. It is not in `safetensors`: the artifacts of all stages depend on its
code."""

from __future__ import annotations

from pathlib import Path

from sqft.checkpoints.safetensors import _raw_header


def tensor_sizes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor in a safetensors file that is known to be complete, from its header alone."""
    entries = _raw_header(path)[0].items()
    return {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries}
