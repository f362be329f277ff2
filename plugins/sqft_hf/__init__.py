"""Hugging Face folders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sqft.api import Exporter, ModelReader, ShardSize, hookimpl, write_config, write_shards

if TYPE_CHECKING:
    from torch import Tensor


class HuggingFace(Exporter):
    """A folder of safetensors that stock transformers loads, in the precision that you choose.

    A quantized model is written as floats: each weight gets the value that its code stands for.
    """

    name = "hf"
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = Field(
        "as-is", description="precision of the stored weights"
    )
    max_shard_size: ShardSize = "5GB"

    def export(self, model: ModelReader, folder: Path) -> None:
        model.copy_settings(folder)
        if self.dtype != "as-is":
            write_config(folder, dtype=self.dtype, torch_dtype=self.dtype)
        write_shards(self._tensors(model), folder, self.max_shard_size)

    def _tensors(self, model: ModelReader) -> Iterator[tuple[str, Tensor]]:
        import torch

        for name in model.names():
            tensor = model.tensor(name)
            if self.dtype != "as-is" and tensor.is_floating_point():
                tensor = tensor.to(getattr(torch, self.dtype))
            yield name, tensor


@hookimpl
def sqft_exporters() -> Iterator[type[Exporter]]:
    yield HuggingFace
