"""Make a recipe to start from fit its model: how its weights are stored, its layers' names and widths, its window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.checkpoints.gptq import gptq_settings
from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.packed_floats import packed_floats
from sqft.checkpoints.safetensors import read_object
from sqft.components.kinds import Merger
from sqft.components.registry import Registry
from sqft.errors import ModelError, SqftError
from sqft.tools.presets import PIPELINES, TARGETS
from sqft.types import BaseKind
from sqft.utils.globs import covering
from sqft.utils.hub import HUB_ID, fetch

LENGTHS = (("calibration", "length"), ("finetune", "max_length"), ("evaluate", "perplexity", "length"))
"""The numbers of tokens that the model's window must hold."""
MAKE_CODES = ("sparsify", "quantize")
"""The sections that a model which came as codes cannot have, and the steps of it that cannot be measured."""
GROUP_SIZES = (64, 32, -1)
"""Of a grid, the one to prefer first."""


@dataclass(frozen=True)
class KnownModel:
    """What the modules of a model say; whether its weights are codes, or floats of eight bits or fewer."""

    layout: ModelLayout
    codes: bool = False
    packed: bool = False


def look_at(model: str, trust_remote_code: bool = False) -> KnownModel | None:
    """Return what there is to know of a model without its weights: of a folder, a GGUF file, or a Hugging Face id, of
    which no more than config.json, and its code if that is trusted, is downloaded. None when it is not there.

    Raises:
        SqftError: when it cannot be downloaded, sqft does not read such a model, or transformers cannot make one of its
            config.
    """
    path = Path(model).expanduser()
    if not path.exists() and not HUB_ID.fullmatch(model):
        return None
    if not path.exists():
        path = fetch("model", model, None, ("config.json", *(("*.py",) if trust_remote_code else ())), path)
    from sqft.modeling.architecture.layout import describe

    config = {} if path.is_file() else read_object(path / "config.json")
    packed = packed_floats(config) is not None
    codes = not packed and gptq_settings(path, config) is not None
    spec = ModelSpec(path, trust_remote_code=trust_remote_code, dequantize=packed)
    try:
        layout = describe(spec, ModelSource("gguf" if path.is_file() else "folder", path, "", {}))
    except ModelError as error:
        if trust_remote_code or "custom code" not in str(error):  # as transformers calls it
            raise
        raise ModelError(f"{str(error).rstrip(' .')}. If you trust it, --trust-remote-code lets it run") from None
    return KnownModel(layout, codes, packed)


def fit(raw: dict[str, Any], model: KnownModel, registry: Registry) -> None:
    """Change a recipe so that the plan accepts it for a model: how it is loaded, lengths, layers to exclude, groups,
    and targets. Of a model that came as codes, only training is left.

    Raises:
        SqftError: when the recipe does not train, or not on codes, and the model came as codes.
    """
    layout = model.layout
    if model.packed:
        raw["model"]["dequantize"] = True
    if model.codes:
        _fit_codes(raw, registry)
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


def _fit_codes(raw: dict[str, Any], registry: Registry) -> None:
    """Leave out what makes codes, or the zeros under them, and what measures that."""
    if not _trains_on_codes(raw, registry):
        known = {one.component.name for one in registry.entries() if one.component.kind == Merger.kind}
        possible = {name: p.sections for name, p in PIPELINES.items() if known >= {*_mergers(p.sections)}}
        fitting = [name for name, sections in possible.items() if _trains_on_codes(sections, registry)]
        raise SqftError(
            f"the model came as codes, which are neither pruned nor quantized again, and pipeline '{raw['name']}' does "
            f"not train on them; these do: {', '.join(fitting)}. Or name the float model that it was made from"
        )
    for section in ("calibration", *MAKE_CODES):
        raw.pop(section, None)
    raw["finetune"].pop("base", None)
    raw["evaluate"]["of"] = ["model", *(name for name in raw["evaluate"]["of"] if name not in ("model", *MAKE_CODES))]


def _trains_on_codes(sections: Mapping[str, Any], registry: Registry) -> bool:
    mergers: list[Any] = [registry.get(Merger.kind, name).component for name in _mergers(sections)]
    return any(BaseKind.QUANTIZED in merger.bases for merger in mergers)


def _mergers(sections: Mapping[str, Any]) -> list[str]:
    """Return the name of the merger that a recipe trains with, if it trains."""
    return [sections["finetune"]["merger"]] if "finetune" in sections else []


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
