"""GGUF files, which llama.cpp and the programs made of it read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sqft.api import Exporter, ModelReader, hookimpl

Precision = Literal["as-is", "float32", "bfloat16", "float16"]


class Gguf(Exporter):
    """One GGUF file, `model.gguf`. Codes are written as they are: every weight keeps its value, and every zero.

    Codes of 4 bits become Q4_0 where the grid is symmetric, and Q5_0 where it is not; those of 2 and 3 bits Q4_0, and
    symmetric ones of 8 bits Q8_0. Groups must be multiples of 32 inputs, in order.
    """

    name = "gguf"
    dtype: Precision = Field("as-is", description="precision of matrices that are floats")
    embeddings: Literal["as-is", "float32", "bfloat16", "float16", "q8_0"] = Field(
        "as-is", description="precision of the embeddings and the head; q8_0 rounds them to 8 bits"
    )

    def refuses(self, path: Path, config: Mapping[str, Any], grid: Mapping[str, Any]) -> str | None:
        if find_spec("gguf") is None:
            return "writing a GGUF file needs the package gguf: pip install 'sqft[gguf]'"
        from sqft_gguf.families import refusal_of_config
        from sqft_gguf.grids import refusal_of_grid
        from sqft_gguf.vocabulary import refusal_of_tokenizer

        kind = config.get("model_type")
        return refusal_of_config(config) or refusal_of_grid(grid) or refusal_of_tokenizer(path, kind)

    def export(self, model: ModelReader, folder: Path) -> None:
        from sqft_gguf.writer import write

        write(model, folder, self.dtype, self.embeddings)


@hookimpl
def sqft_exporters() -> Iterator[type[Exporter]]:
    yield Gguf
