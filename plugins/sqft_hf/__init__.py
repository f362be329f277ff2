"""Hugging Face folders."""

from __future__ import annotations

import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from sqft.api import Exporter, ModelReader, hookimpl

UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class HuggingFace(Exporter):
    """A folder of safetensors that stock transformers loads, in the precision you serve with."""

    name = "hf"
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = Field("as-is", description="precision to store")
    max_shard_size: int | str = Field(
        "5GB", description='largest file of weights, as save_pretrained takes it: bytes, or a size such as "5GB"'
    )

    @field_validator("max_shard_size", mode="before")
    @classmethod
    def _is_a_size(cls, size: Any) -> Any:
        in_bytes(size)
        return size

    def export(self, model: ModelReader, folder: Path) -> None:
        from sqft_hf.writer import write

        write(model, folder, None if self.dtype == "as-is" else self.dtype, in_bytes(self.max_shard_size))


def in_bytes(size: Any) -> int:
    """The bytes of a size: an integer, or digits followed by a unit of 1000 ("5MB", "0.5 gb").

    Raises:
        ValueError: when it is neither, or nothing would fit in it.
    """
    words = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]B)\s*", size, re.IGNORECASE) if type(size) is str else None
    number = int(Fraction(words[1]) * UNITS[words[2].upper()]) if words else size
    if type(number) is not int or number < 1:
        raise ValueError(
            f"{size!r} is no size; give a whole number of bytes, or digits followed by KB, MB, GB or TB, such as '5GB'"
        )
    return number


@hookimpl
def sqft_exporters() -> Iterator[type[Exporter]]:
    yield HuggingFace
