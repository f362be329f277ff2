"""Checkpoints in the format of the compressed-tensors library, which transformers and vLLM read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sqft.api import Exporter, ModelReader, ShardSize, hookimpl


class CompressedTensors(Exporter):
    """The "pack-quantized" format of compressed-tensors: packed codes, scales, and zero points if not symmetric.

    Act-order without `static_groups` stores the group of each input, which only versions before 0.19 can read.
    """

    name = "compressed-tensors"
    needs_codes = True
    reads_single_experts = False  # transformers unpacks them into no layer, and fills the experts at random
    max_shard_size: ShardSize = "5GB"

    def export(self, model: ModelReader, folder: Path) -> None:
        from sqft_compressed_tensors.writer import write

        write(model, folder, self.max_shard_size)


@hookimpl
def sqft_exporters() -> Iterator[type[Exporter]]:
    yield CompressedTensors
