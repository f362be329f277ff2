"""A pre-trained model as its headers describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqft.types import LinearShape


@dataclass(frozen=True)
class ModelSource:
    """A pre-trained model: where it is, and what its headers say. No weight has been read."""

    kind: Literal["folder", "gguf"]
    path: Path
    digest: str
    """SHA-256 of all files that can change a result."""
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor of the float model, by its name in the checkpoint."""
    linears: tuple[LinearShape, ...]
    """The linear layers of its decoder blocks, by their names in transformers."""
    quantization: dict[str, Any] | None = None
    """The `quantization_config` of a GPTQ checkpoint; None when the weights are floats."""

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def size(self, *names: str, default: int = 0) -> int:
        """Return the first of these config entries that is a positive integer ("hidden_size", …), or `default`.

        An entry that lists a number for each layer does not count.
        """
        values = (self.config.get(name) for name in names)
        return next((value for value in values if isinstance(value, int) and value), default)
