"""Deltas, rank configurations and adapters as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.ranks import RankConfig, RankGroup, SearchSpace
from sqft.utils.files import write_json


def store_deltas(adapted: AdaptedModel, folder: Path) -> None:
    """Write what trained, and the space that ranks are chosen from."""
    save_file({name: value.cpu() for name, value in adapted.deltas().items()}, folder / "deltas.safetensors")
    groups = [{"name": g.name, "ranks": g.ranks, "members": g.members} for g in adapted.space.groups]
    write_json(folder / "space.json", {"groups": groups})


def space_from(content: Any) -> SearchSpace:
    """Return the search space that a `space.json` holds."""
    return SearchSpace(tuple(RankGroup(g["name"], tuple(g["ranks"]), tuple(g["members"])) for g in content["groups"]))


def store_ranks(config: RankConfig, folder: Path) -> None:
    """Write the chosen rank configuration."""
    write_json(folder / "choice.json", {"ranks": list(config.ranks)})


def read_ranks(folder: Path) -> RankConfig:
    """Return the rank configuration that a search artifact stored."""
    return RankConfig(tuple(json.loads((folder / "choice.json").read_text())["ranks"]))


def store_adapter(adapted: AdaptedModel, config: RankConfig, base: str, folder: Path) -> None:
    """Write the sub-adapter of a configuration, which names its base model's folder `base`.

    Beside its base it is a stock PEFT checkpoint, with the tokenizer: `rank_pattern` and `alpha_pattern` together give
    stock PEFT the same function. A masked adapter is no LoRA, and stock PEFT would compute W + BA
    for it without a word; it gets names that PEFT refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = adapted.space.ranks_by_linear(config)
    scales = {name: layer.delta.factors(ranks[name])[2] for name, layer in adapted.layers.items()}
    tensors = {key: tensor.cpu().contiguous() for key, tensor in adapter_tensors(adapted, config).items()}
    if adapted.mergeable:
        save_file(tensors, folder / "adapter.safetensors", metadata={"format": "pt"})
        merger = next(iter(adapted.mergeable.values())).merger.name
        write_json(
            folder / "sqft_adapter.json", {"merger": merger, "base_model": base, "ranks": ranks, "scales": scales}
        )
        return
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _write_peft_config(adapted, ranks, scales, base, folder)
    adapted.tokenizer.save_pretrained(folder)


def adapter_tensors(adapted: AdaptedModel, config: RankConfig) -> dict[str, Tensor]:
    """Return the tensors of a configuration's sub-adapter under the names that its file has: PEFT's for an adapter that
    stays beside its base, else our own."""
    ranks = adapted.space.ranks_by_linear(config)
    tensors: dict[str, Tensor] = {}
    for name, layer in adapted.layers.items():
        B, A, _ = layer.delta.factors(ranks[name])
        tensors[tensor_name(adapted, name, "lora_A")], tensors[tensor_name(adapted, name, "lora_B")] = A, B
        if layer.scale_multiplier is not None:
            tensors[tensor_name(adapted, name, "scale_multiplier")] = layer.scale_multiplier
    return {key: tensor.detach() for key, tensor in tensors.items()}


def tensor_name(adapted: AdaptedModel, layer: str, part: str) -> str:
    """Return the name that an adapter's file has for a part of a layer's adapter: "lora_A", "lora_B", …"""
    return f"{layer}.{part}" if adapted.mergeable else f"base_model.model.{layer}.{part}.weight"


def _write_peft_config(
    adapted: AdaptedModel, ranks: Mapping[str, int], scales: Mapping[str, float], base: str, folder: Path
) -> None:
    """Write `adapter_config.json`.

    Args:
        adapted: the model whose adapter it is.
        ranks: the rank of each layer.
        scales: alpha / rank of each layer.
        base: the folder of the base model.
        folder: where to write.
    """
    from peft import LoraConfig, TaskType

    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=max(ranks.values()),
        lora_alpha=max(alphas.values()),
        target_modules=sorted(ranks),
        fan_in_fan_out=any(layer.stored_transposed for layer in adapted.layers.values()),
        rank_pattern=dict(ranks),
        alpha_pattern=alphas,
        inference_mode=True,
    ).save_pretrained(str(folder))
