"""Copy a model folder, its tensors in another precision, one shard at a time."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from sqft.api import ModelReader

CARRIED = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".py", ".md"}
"""Suffixes of what lies beside the weights: configs, tokenizer, chat templates, custom code, the model's card."""
BARE = {"LICENSE", "NOTICE"}


def write(model: ModelReader, folder: Path, dtype: str | None, limit: int) -> None:
    """Write `model` into `folder`; every floating tensor as `dtype`, or as it is; no file over `limit` bytes
    of tensors, but for a tensor that is larger alone."""
    _carry(model.folder, folder)
    if dtype:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        config["dtype"] = config["torch_dtype"] = dtype
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    shards: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total = size = 0
    for name in model.names():
        tensor = model.tensor(name)
        if dtype and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        if shard and size + tensor.nbytes > limit:
            shards.append(_store(shard, folder, len(shards)))
            size = 0
        shard[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    shards.append(_store(shard, folder, len(shards)))
    _name(shards, folder, total)


def _carry(source: Path, folder: Path) -> None:
    """Copy what is no weight and no index of weights: theirs are written anew, and old ones would be loaded."""
    for file in [*source.iterdir(), *source.glob("additional_chat_templates/*.jinja")]:
        known = file.suffix in CARRIED or file.stem in BARE
        if known and file.is_file() and not file.name.endswith(".index.json"):
            target = folder / file.relative_to(source)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)  # not its mode: a read-only config could not be rewritten


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
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
