"""Make a recipe to start from fit its model: the names and the widths of the layers, and the window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.components.registry import Registry
from sqft.tools.presets import TARGETS
from sqft.utils.globs import covering
from sqft.utils.hub import HUB_ID, fetch

LENGTHS = (("calibration", "length"), ("finetune", "max_length"), ("evaluate", "perplexity", "length"))
"""The numbers of tokens that the model's window must hold."""
GROUP_SIZES = (64, 32, -1)
"""Of a grid, the one to prefer first."""


def layout_of(model: str) -> ModelLayout | None:
    """Return what the modules of a model say: of a folder, a GGUF file, or a Hugging Face id, of which no more than
    config.json is downloaded. None when it is not there.

    Raises:
        SqftError: when it cannot be downloaded, or transformers cannot make a model of its config.
    """
    path = Path(model).expanduser()
    if not path.exists() and not HUB_ID.fullmatch(model):
        return None
    if not path.exists():
        path = fetch("model", model, None, ("config.json",), path)
    from sqft.modeling.architecture.layout import describe

    return describe(ModelSpec(path), ModelSource("gguf" if path.is_file() else "folder", path, "", {}))


def fit(raw: dict[str, Any], layout: ModelLayout, registry: Registry) -> None:
    """Change a recipe so that the plan accepts it for a model: lengths, layers to exclude, groups, and targets."""
    for *sections, key in LENGTHS:
        holder = raw
        for section in sections:
            holder = holder.get(section, {})
        if key in holder:
            holder[key] = min(holder[key], layout.sizes.get("max_position_embeddings") or holder[key])
    out = {*layout.unseen, *layout.shared}
    if "sparsify" in raw:
        _exclude(raw["sparsify"], out, layout)
    if "quantize" in raw:
        _exclude(raw["quantize"], out | _fit_grid(raw["quantize"]["quantizer"], out, layout, registry), layout)
    if "finetune" in raw:
        merges = registry.get("merger", raw["finetune"]["merger"]).component.merges  # type: ignore[attr-defined]
        raw["finetune"]["targets"] = targets_of(layout, merges)


def targets_of(layout: ModelLayout, merges: bool) -> list[str]:
    """Return the last names of the layers to adapt: the paper's where the model has them all, else all that it has.

    Left out are names of layers that share a weight, and of those that PEFT cannot reach, unless the adapter `merges`.
    """
    names = dict.fromkeys(layer.name.rpartition(".")[2] for layer in layout.linears)
    papers = names.keys() >= set(TARGETS)
    out = {*layout.shared, *(() if papers else layout.narrow)}
    if not merges:
        experts = set(layout.experts)
        out |= {layer.name for layer in layout.linears if layer.name.rpartition(".")[0] in experts} | {*layout.unseen}
    without = {name.rpartition(".")[2] for name in out}
    return [name for name in (TARGETS if papers else names) if name not in without]


def _exclude(section: dict[str, Any], out: set[str], layout: ModelLayout) -> None:
    """Exclude some layers from a section, and no others."""
    if out:
        others = [layer.name for layer in layout.linears if layer.name not in out]
        section["exclude"] = covering(out, others)


def _fit_grid(quantizer: dict[str, Any], out: set[str], layout: ModelLayout, registry: Registry) -> set[str]:
    """Choose the group size that most layers can have; return those that cannot."""
    component = registry.get("quantizer", quantizer["name"]).component
    layers = [layer for layer in layout.linears if layer.name not in out | {*layout.narrow}]

    def unfit(size: int) -> set[str]:
        made: Any = component.model_validate(quantizer["options"] | {"group_size": size})
        return {layer.name for layer in layers if made.incompatibility(layer)}

    best = min(GROUP_SIZES, key=lambda size: len(unfit(size)))
    quantizer["options"]["group_size"] = best
    return unfit(best)
