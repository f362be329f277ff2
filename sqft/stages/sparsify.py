"""Set the least important weights to zero (paper §2.1).

Three questions, three places: the scorer says how much a weight matters, the allocator how much
sparsity a layer gets, and `kernels.masks` which entries are then kept.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sqft import checks
from sqft.contracts import Allocator, LinearStats, Scorer
from sqft.errors import ArtifactError, StageError
from sqft.kernels.masks import keep_mask, pack_mask, unpack_mask
from sqft.modeling.blocks import linears, shape_of
from sqft.modeling.load import FolderReader, load_source, save_model
from sqft.plan import selected
from sqft.recipe import Sparsify
from sqft.stages.base import Context


def run(context: Context) -> dict[str, Any]:
    """Write `model/` (the sparse model) and `masks.safetensors` (bit-packed, true where kept)."""
    section = cast(Sparsify, context.step.section)
    recipe, scorer, who = context.plan.recipe, context.component(Scorer), context.who(Scorer)
    model, tokenizer = load_source(context.plan.source, recipe.model.dtype, recipe.model.trust_remote_code)
    layers = {
        name: linear for name, linear in linears(model).items() if selected(name, section.include, section.exclude)
    }
    if not layers:
        raise StageError("sparsify.include matches no linear layer of the model's decoder blocks")
    shapes = tuple(shape_of(name, linear) for name, linear in layers.items())
    allocation = context.component(Allocator).allocate(shapes, section.sparsity)
    checks.check_allocation(context.who(Allocator), shapes, allocation)
    masks: dict[str, Tensor] = {}
    report: dict[str, Any] = {}

    def compress(name: str, linear: nn.Linear, stats: LinearStats) -> None:
        weight = linear.weight.detach().to(torch.float32, copy=True)
        kept = weight.clone()
        generator = torch.Generator(weight.device).manual_seed(context.seed_for("sparsify", name))
        stats = LinearStats(stats.tokens, stats.input_sq_sum, stats.hessian, generator)
        scores = scorer.score(weight, stats)
        checks.check_unchanged(who, name, kept, weight)
        checks.check_scores(who, name, kept, scores)
        mask = keep_mask(scores, allocation[name], section.pattern)
        linear.weight.data.masked_fill_(~mask, 0)
        masks[name] = pack_mask(mask).cpu()
        report[name] = 1 - mask.float().mean().item()

    tokens = context.feed(model, tokenizer, layers, scorer.needs, compress, "scoring")
    save_model(model, tokenizer, context.folder / "model")
    save_file(masks, context.folder / "masks.safetensors")
    total = sum(linear.weight.numel() for linear in layers.values())
    zeros = sum(int((linear.weight == 0).sum()) for linear in layers.values())
    return {
        "sparsity": zeros / total,
        "zeros": zeros,
        "weights": total,
        "parameters": model.num_parameters(),
        "layers": report,
        "calibration_tokens": tokens,
    }


def prove(context: Context) -> None:
    """Every pruned entry is zero, every kept one is the original bit for bit, all are finite."""
    recipe = context.plan.recipe
    original, _ = load_source(context.plan.source, recipe.model.dtype, recipe.model.trust_remote_code)
    packed = load_file(context.folder / "masks.safetensors")
    reader, who = FolderReader(context.folder / "model"), context.who(Scorer)
    weights: dict[str, Tensor] = original.state_dict()
    stored_names, parameters = set(reader.names()), dict(original.named_parameters())
    if odd := sorted((stored_names - weights.keys()) | (parameters.keys() - stored_names)):
        raise StageError(
            f"{type(original).__name__} stores its weights under other names than its modules have ({odd[0]}); "
            "such architectures are not handled yet"
        )
    for name, stored in reader.tensors():
        expected = weights[name].detach()
        layer = name.removesuffix(".weight")
        if layer in packed:
            mask = unpack_mask(packed[layer], (expected.shape[0], expected.shape[1]))
            expected = expected.masked_fill(~mask, 0)
        if not stored.isfinite().all():
            raise ArtifactError(f"sparsify ({who}): {name} as stored holds values that are not finite")
        if stored.dtype != expected.dtype or not torch.equal(stored, expected):
            wrong = int((stored != expected).sum())
            raise ArtifactError(
                f"sparsify ({who}): {name} as stored is not the masked original ({wrong} entries differ)"
            )
