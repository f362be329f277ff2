"""Folders for mlx_lm, which runs models on Apple's machines with MLX."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from sqft.api import Exporter, ModelReader, ShardSize, hookimpl


class Mlx(Exporter):
    """A folder for mlx_lm. Codes are written as they are: every weight keeps its value, and every zero.

    MLX's value is scale · code + bias. The bias, −scale · zero point, is exact: in float16, as the scale is, where it
    fits, which is so on symmetric grids; otherwise both are float32. Groups must be multiples of 32 inputs, in order.
    """

    name = "mlx"
    dtype: Literal["as-is", "float32", "bfloat16", "float16"] = Field(
        "as-is", description="precision of the tensors that are floats"
    )
    max_shard_size: ShardSize = "5GB"

    def refuses(self, path: Path, config: Mapping[str, Any], grid: Mapping[str, Any]) -> str | None:
        from sqft_mlx.settings import refusal_of_config, refusal_of_grid

        return refusal_of_config(config) or refusal_of_grid(grid)

    def export(self, model: ModelReader, folder: Path) -> None:
        from sqft_mlx.writer import write

        write(model, folder, self.dtype, self.max_shard_size)


@hookimpl
def sqft_exporters() -> Iterator[type[Exporter]]:
    yield Mlx
