"""Deltas, choices and adapters as files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sqft.checkpoints.families import TRANSPOSED
from sqft.components.kinds import Merger
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.types import RankConfig, RankGroup, SearchSpace
from sqft.utils.files import write_json


def store_deltas(tuned: AdaptedModel, folder: Path) -> None:
    save_file({name: value.cpu() for name, value in tuned.deltas().items()}, folder / "deltas.safetensors")
    write_json(folder / "space.json", asdict(tuned.space))


def space_from(content: Any) -> SearchSpace:
    return SearchSpace(tuple(RankGroup(g["name"], tuple(g["ranks"]), tuple(g["members"])) for g in content["groups"]))


def store_ranks(choice: RankConfig, folder: Path) -> None:
    write_json(folder / "choice.json", {"ranks": list(choice.ranks)})


def read_ranks(folder: Path) -> RankConfig:
    """The configuration a search artifact stored."""
    return RankConfig(tuple(json.loads((folder / "choice.json").read_text())["ranks"]))


def store_adapter(tuned: AdaptedModel, choice: RankConfig, merger: Merger, base: str, folder: Path) -> None:
    """Write the sub-adapter of a configuration.

    For `unmerged` it is a stock PEFT checkpoint: `rank_pattern` and `alpha_pattern` together give
    stock PEFT the same function. A masked adapter is no LoRA, and stock PEFT would compute W + BA
    for it without a word; it gets names that PEFT refuses.
    """
    folder.mkdir(parents=True, exist_ok=True)
    ranks = tuned.space.ranks_by_linear(choice)
    factors = {name: layer.delta.factors(ranks[name]) for name, layer in tuned.adapted.items()}
    scales = {name: scale for name, (_, _, scale) in factors.items()}
    if merger.merges:
        tensors = {f"{n}.{k}": t for n, (b, a, _) in factors.items() for k, t in (("lora_B", b), ("lora_A", a))}
        tensors |= {
            f"{n}.scale_multiplier": layer.scale_multiplier
            for n, layer in tuned.adapted.items()
            if layer.scale_multiplier is not None
        }
        _save(tensors, folder / "adapter.safetensors")
        content = {"merger": merger.name, "base_model": base, "ranks": ranks, "scales": scales}
        write_json(folder / "sqft_adapter.json", content)
        return
    from peft import LoraConfig, TaskType

    top = max(ranks.values())
    alphas = {name: scales[name] * rank for name, rank in ranks.items()}
    LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        base_model_name_or_path=base,
        r=top,
        lora_alpha=max(alphas.values()),
        target_modules=sorted(ranks),
        fan_in_fan_out=tuned.model.config.model_type in TRANSPOSED,
        rank_pattern=dict(ranks),
        alpha_pattern=alphas,
        inference_mode=True,
    ).save_pretrained(str(folder))
    peft_names = {
        f"base_model.model.{name}.{which}.weight": tensor
        for name, (b, a, _) in factors.items()
        for which, tensor in (("lora_A", a), ("lora_B", b))
    }
    _save(peft_names, folder / "adapter_model.safetensors")


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
