"""Copy a model folder, its tensors in another precision, one shard at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sqft.api import ModelReader

SHARD = 5 * 10**9  # bytes


def write(model: ModelReader, folder: Path, dtype: str | None) -> None:
    """Write `model` into `folder`; every floating tensor as `dtype`, or as it is."""
    for file in model.folder.iterdir():
        if file.is_file() and file.suffix != ".safetensors" and not file.name.endswith(".index.json"):
            shutil.copy2(file, folder)
    if dtype:
        config = json.loads((folder / "config.json").read_text())
        config["dtype"] = config["torch_dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name in model.names():
        tensor = model.tensor(name)
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        if shard and size + tensor.nbytes > SHARD:
            shards.append(_store(shard, folder, len(shards)))
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_store(shard, folder, len(shards)))
    _name(shards, folder, total)


def _store(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
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
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
