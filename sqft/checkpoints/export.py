"""Model folders as exporters write them: tensors in shards, entries of config.json. No torch until one is written."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field

from sqft.checkpoints.families import IN_A_BLOCK
from sqft.types import ModelReader, Quantized

if TYPE_CHECKING:
    from torch import Tensor


UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


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


def _checked(size: Any) -> Any:
    in_bytes(size)
    return size


ShardSize = Annotated[
    int | str,
    BeforeValidator(_checked),
    Field(description='largest file of weights, as save_pretrained takes it: bytes, or a size such as "5GB"'),
]
"""An exporter's option: how large a file of weights may be, as the user wrote it."""


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int | str) -> None:
    """Write named tensors into `folder` as safetensors, one shard in memory at a time, with their index.

    No file holds more than `limit` bytes of tensors, but for a tensor that is larger alone.
    """
    largest = in_bytes(limit)
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > largest:
            shards.append(_store(shard, folder, len(shards)))
            size = 0
        shard[name] = tensor.contiguous()
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_store(shard, folder, len(shards)))
    _name(shards, folder, total)


def _store(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    from safetensors.torch import save_file

    save_file(shard, folder / f"part-{number}.safetensors", metadata={"format": "pt"})
    names = list(shard)
    shard.clear()
    return names


def _name(shards: list[list[str]], folder: Path, total: int) -> None:
    """Shard names say how many there are, so they are given last."""
    if len(shards) == 1:
        (folder / "part-0.safetensors").rename(folder / "model.safetensors")
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"part-{number}.safetensors").rename(folder / file)
        places |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def write_config(folder: Path, **entries: Any) -> None:
    """Set entries of the `config.json` in `folder`."""
    place = folder / "config.json"
    config = json.loads(place.read_text("utf-8"))
    place.write_text(json.dumps(config | entries, indent=2) + "\n", "utf-8")


def float_layers(model: ModelReader) -> list[str]:
    """The linear layers of the model's blocks that are on no grid: formats name them, or their readers expect codes."""
    quantized = {f"{layer}.weight" for layer in model.quantized()}
    names = [name for name in model.names() if IN_A_BLOCK.search(name) and name not in quantized]
    return [name.removesuffix(".weight") for name in names if model.tensor(name).ndim == 2]


def parameters(model: ModelReader, parts: Callable[[Quantized], Mapping[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Every parameter of the model by name, but for a quantized layer the tensors that `parts` makes of its codes."""
    quantized = {f"{layer}.weight": layer for layer in model.quantized()}
    for name in model.names():
        layer = quantized.get(name)
        if layer is None:
            yield name, model.tensor(name)
        else:
            yield from ((f"{layer}.{part}", tensor) for part, tensor in parts(model.codes(layer)).items())
