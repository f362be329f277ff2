"""A pre-trained model as its headers describe it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sqft.checkpoints.layout import ModelLayout


@dataclass(frozen=True)
class ModelSource:
    """A pre-trained model: where it is, and what its headers say. No weight has been read."""

    kind: Literal["folder", "gguf"]
    path: Path
    digest: str
    """SHA-256 of all files that can change a result."""
    shapes: dict[str, tuple[int, ...]]
    """Shape of every tensor of the float model, by its name in the checkpoint."""
    layout: ModelLayout = field(default_factory=ModelLayout)
    """What its modules say; empty until the plan asks for it."""
    quantization: dict[str, Any] | None = None
    """The `quantization_config` of a GPTQ checkpoint; None when the weights are floats."""
    dtype: str | None = None
    """The precision of most of the checkpoint's floats; None where it has none of a precision that sqft loads."""
    dequantize: bool = False
    """Whether the weights are MXFP4 or FP8, which are loaded as floats."""

    @property
    def parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    def size(self, name: str, default: int = 0) -> int:
        """Return an entry of the text model's config ("hidden_size", …), or `default` where it has no such number."""
        return self.layout.sizes.get(name, default)
