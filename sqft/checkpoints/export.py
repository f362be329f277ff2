"""Model folders as exporters write them: tensors in shards, entries of config.json. No torch until one is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from sqft.checkpoints.safetensors import WEIGHTS, write_index
from sqft.types import ModelReader, Quantized

if TYPE_CHECKING:
    from torch import Tensor


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def in_bytes(size: Any) -> int:
    """Return a size in bytes: an integer, or digits followed by a decimal unit ("5MB", "0.5 gb").

    Raises:
        ValueError: when it is neither, or less than one byte.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]B)\s*", size, re.IGNORECASE) if type(size) is str else None
    number = int(Fraction(match[1]) * UNITS[match[2].upper()]) if match else size
    if type(number) is not int or number < 1:
        raise ValueError(
            f"{size!r} is not a size; give a number of bytes as an integer, or digits followed by KB, MB, GB or TB, "
            "such as '5GB'"
        )
    return number


def _valid_size(size: Any) -> Any:
    in_bytes(size)
    return size


ShardSize = Annotated[
    int | str,
    BeforeValidator(_valid_size),
    Field(description='largest file of weights, as save_pretrained takes it: bytes, or a size such as "5GB"'),
]
"""An exporter's option: how large a file of weights may be, as the user wrote it."""


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int | str) -> None:
    """Write named tensors into `folder` as safetensors files and their index, with one shard in memory at a time.

    No file holds more than `limit` bytes of tensors, except that a larger tensor gets a file of its own.
    """
    largest = in_bytes(limit)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > largest:
            shards.append(_write_shard(shard, folder, len(shards)))
            size = 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_write_shard(shard, folder, len(shards)))
    _name_shards(shards, folder, total)


def _write_shard(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    from safetensors.torch import save_file

    save_file(shard, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
    names = list(shard)
    shard.clear()
    return names


def _name_shards(shards: list[list[str]], folder: Path, total: int) -> None:
    """Rename the shards, whose final names say how many there are, and write the index."""
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / WEIGHTS)
        return
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        file_of |= dict.fromkeys(names, file)
    write_index(folder, file_of, total)


def write_config(folder: Path, **entries: Any) -> None:
    """Set entries of the `config.json` in `folder`."""
    file = folder / "config.json"
    config = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps(config | entries, indent=2) + "\n", "utf-8")


def float_layers(model: ModelReader) -> list[str]:
    """Return the names of the linear layers in the model's blocks that are not quantized.

    Formats list them in their settings; a reader would otherwise expect codes.
    """
    return list(model.float_layers())


def parameters(model: ModelReader, parts: Callable[[Quantized], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of a folder of codes by name; a quantized layer as the tensors `parts` makes of it."""
    quantized = {f"{layer}.weight": layer for layer in model.quantized()}
    for name in sorted([*model.floats(), *quantized]):
        layer = quantized.get(name)
        if layer is None:
            yield name, model.tensor(name)
        else:
            yield from ((f"{layer}.{part}", tensor) for part, tensor in parts(model.codes(layer)).items())
