"""A pre-trained model as its headers describe it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqft.types import LinearShape


@dataclass(frozen=True)
class ModelSource:
    """A pre-trained model that was found: where it lies and what its headers say."""

    kind: Literal["folder", "gguf", "hub"]
    path: Path
    digest: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    linears: tuple[LinearShape, ...]
    """The linear layers of its decoder blocks, by their names in transformers."""
    quantization: dict[str, Any] | None = None
    """A GPTQ checkpoint's `quantization_config`; None when the weights are floats."""

    @property
    def parameters(self) -> int:
        return sum(_product(shape) for shape in self.shapes.values())

    def size(self, *names: str, default: int = 0) -> int:
        """The first of these numbers that the config has ("hidden_size", …); one that differs by layer is none."""
        found = (self.config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int) and value), default)


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
