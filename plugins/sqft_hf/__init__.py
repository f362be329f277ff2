"""Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import Field

from sqft.api import Exporter, ModelReader, hookimpl


class HuggingFace(Exporter):
    """A folder of safetensors that stock transformers loads, in the precision you serve with."""

    name = "hf"
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = Field("as-is", description="precision to store")

    def export(self, model: ModelReader, folder: Path) -> None:
        from sqft_hf.writer import write

        write(model, folder, None if self.dtype == "as-is" else self.dtype)


@hookimpl
def sqft_exporters() -> Iterator[type[Exporter]]:
    yield HuggingFace
