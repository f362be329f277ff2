"""Fold the chosen sub-adapter into the base: the weight stored is the weight trained through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sqft.contracts import Merger
from sqft.errors import ArtifactError
from sqft.modeling.load import FolderReader, save_model
from sqft.modeling.tuning import Tuned, base_model, read_choice, restore
from sqft.stages.base import Context


def run(context: Context) -> dict[str, Any]:
    """Write `model/`, a Hugging Face folder in the base's precision."""
    effective = _effective(context)
    model, tokenizer = base_model(context.plan, context.model_folder())
    zeros_before = zeros_after = weights = 0
    for name, merged in effective.items():
        parameter = model.get_parameter(f"{name}.weight")
        zeros_before += int((parameter == 0).sum())
        zeros_after += int((merged == 0).sum())
        weights += merged.numel()
        parameter.data.copy_(merged)
    save_model(model, tokenizer, context.folder / "model")
    return {
        "layers": len(effective),
        "weights": weights,
        "zeros_before": zeros_before,
        "zeros_after": zeros_after,
        "sparsity": zeros_after / weights,
    }


def prove(context: Context) -> None:
    """Stored = trained through, bit for bit; every zero of the base is zero; nothing else has moved."""
    effective = _effective(context)
    base, _ = base_model(context.plan, context.model_folder())
    finetune = context.plan.step("finetune")
    merger, who = context.component(Merger, finetune), context.who(Merger, finetune)
    for name, stored in FolderReader(context.folder / "model").tensors():
        original = base.get_parameter(name).detach()
        layer = name.removesuffix(".weight")
        expected = effective.pop(layer, original)
        if not stored.isfinite().all():
            raise ArtifactError(f"merge ({who}): {name} as stored holds values that are not finite")
        if stored.dtype != original.dtype or not torch.equal(stored, expected):
            raise ArtifactError(f"merge ({who}): {name} as stored is not the weight trained through")
        lost = int(((original == 0) & (stored != 0)).sum())
        if lost and merger.keeps_mask:
            raise ArtifactError(f"merge ({who}): {lost} zeros of the base are not zero in {name}")
    if effective:
        raise ArtifactError(f"merge ({who}): {next(iter(effective))} was not stored")


def _effective(context: Context) -> dict[str, Tensor]:
    """Every adapted layer's effective weight under the chosen configuration, on the CPU."""
    tuned: Tuned = restore(context.plan, context.model_folder(), context.inputs["finetune"].folder, "cpu")
    tuned.choose(read_choice(context.inputs["search"].folder))
    return {name: layer.effective() for name, layer in tuned.adapted.items()}
