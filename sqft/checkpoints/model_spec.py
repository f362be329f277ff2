"""Which model to load, and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ModelSpec:
    """Which model to load, in which precision, whether its own code may run, and whether it must be dequantized.

    `path` is a folder in Hugging Face layout, with floats or with GPTQ codes, or a GGUF file. `dtype` is the name of a
    torch dtype; None means the precision that is stored. `dequantize` is for a folder of MXFP4 or FP8, which is loaded
    as the floats that it stands for.
    """

    path: Path
    dtype: str | None = None
    trust_remote_code: bool = False
    dequantize: bool = False

    @property
    def is_gguf(self) -> bool:
        return self.path.suffix == ".gguf"
