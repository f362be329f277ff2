"""Build the adapted model that a stage works on, from the plan and the artifacts before it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sqft.components import checks
from sqft.components.kinds import Adapter, Merger
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.masks import unpack_mask
from sqft.modeling.adapters.adapted_linear import attach
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.frozen_weight import FloatWeight, FrozenWeight, PackedLinear
from sqft.modeling.adapters.saving import space_from
from sqft.modeling.architecture.blocks import all_linears, shape_of
from sqft.modeling.loading import load_model, load_packed, load_tokenizer
from sqft.modeling.loading.quantized import read_grids
from sqft.planning.plan import Plan
from sqft.recipe.sections import Finetune
from sqft.types import BaseKind
from sqft.utils.globs import selected


def build_adapted_model(plan: Plan, folders: Mapping[str, Path], seed: int, device: str) -> AdaptedModel:
    """Load the base and attach untrained deltas; `folders` are the step's input artifacts by role.

    Raises:
        ContractError: when the adapter's space or deltas break its contract.
    """
    step = plan.step("finetune")
    section = cast(Finetune, step.section)
    adapter, merger, label = step.component(Adapter), step.component(Merger), step.label(Adapter)
    base = plan.adapter_base
    packed = base.quantized and not (merger.merges and section.base == "floats")
    if packed:
        spec = replace(plan.spec(base.model(folders)), dtype=plan.model_spec.dtype)
        model, tokenizer = load_packed(spec), load_tokenizer(spec)
    else:
        model, tokenizer = load_model(plan.spec(base.model(folders)))
    layers = {n: layer for n, layer in all_linears(model).items() if selected(n, section.targets, ())}
    if not layers:
        raise StageError("finetune.targets matches no linear layer of the model's decoder blocks")
    shapes = tuple(shape_of(n, layer) for n, layer in layers.items())
    space = adapter.space(shapes)
    checks.check_space(label, shapes, space)
    ranks = {member: group.ranks for group in space.groups for member in group.members}
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for shape in shapes:
        deltas[shape.name] = adapter.delta(shape, generator)
        checks.check_delta(label, shape, deltas[shape.name], ranks[shape.name])
    dropout = checks.check_dropout(label, adapter.input_dropout())
    # A model that came sparse keeps its zeros too: a merger that promises to keep them gets a mask of any base.
    masked = merger.keeps_mask or base.kind is not BaseKind.DENSE
    if packed:
        weights = _packed(
            layers, base.masks(folders) if merger.merges else None, merger.merges and section.mask == "codes"
        )
    elif base.quantized:
        weights = _before_quantization(plan, folders, layers, masked)
    else:
        weights = {name: FloatWeight(layer.weight, masked) for name, layer in layers.items()}
    adapted = attach(model, deltas, merger, weights, dropout, merger.learns_scales())
    model.to(device)
    return AdaptedModel(model, tokenizer, adapted, space)


def _packed(layers: Mapping[str, nn.Module], masks: Path | None, mask_codes: bool) -> dict[str, FrozenWeight]:
    """The layers' own codes, with a mask where one is wanted, of a file or of the codes that stand for 0; a layer left
    in floats keeps them."""
    kept = load_file(masks) if masks else {}
    weights: dict[str, FrozenWeight] = {}
    for name, layer in layers.items():
        if isinstance(layer, PackedLinear):
            weights[name] = layer.base
            if name in kept:
                layer.base.set_mask(unpack_mask(kept[name], (layer.out_features, layer.in_features)))
            elif mask_codes:
                layer.base.set_mask(layer.base.block().weight != 0)
        else:
            weights[name] = FloatWeight(cast(Tensor, layer.weight), True)
    return weights


def _before_quantization(
    plan: Plan, folders: Mapping[str, Path], layers: Mapping[str, nn.Module], masked: bool
) -> dict[str, FrozenWeight]:
    """The float weights that were quantized, with the grids they were put on (paper §2.4)."""
    path = plan.adapter_base.floats(folders)
    assert path is not None
    grids = read_grids(plan.adapter_base.model(folders), layers)
    for name in grids:  # floats take the place of what the codes stand for: both are never in memory together
        weight = cast(Tensor, layers[name].weight)
        layers[name].weight = nn.Parameter(weight.to("meta"), requires_grad=False)
    floats, _ = load_model(plan.spec(path))
    return {
        name: FloatWeight(floats.get_parameter(f"{name}.weight"), masked, grids[name])
        if name in grids
        else FloatWeight(cast(Tensor, layer.weight), masked)
        for name, layer in layers.items()
    }


def load_adapted_model(plan: Plan, folders: Mapping[str, Path], deltas: Path, device: str) -> AdaptedModel:
    """Load the base and the deltas that a finetune artifact, in the folder `deltas`, stored.

    Raises:
        ArtifactError: when a tensor is missing, mis-shaped or not finite; the message names it.
    """
    adapted = build_adapted_model(plan, folders, 0, device)
    stored = load_file(deltas / "deltas.safetensors")
    expected = adapted.deltas()
    if stored.keys() != expected.keys():
        odd = sorted(stored.keys() ^ expected.keys())[0]
        raise ArtifactError(f"{deltas / 'deltas.safetensors'} and the adapter disagree about tensor {odd}")
    for name, layer in adapted.layers.items():
        own = {key: stored[f"{name}.{key}"] for key in layer.trainable_tensors()}
        for key, value in own.items():
            if value.shape != expected[f"{name}.{key}"].shape or not value.isfinite().all():
                raise ArtifactError(f"{deltas / 'deltas.safetensors'}: {name}.{key} is mis-shaped or not finite")
        layer.load_trainable_tensors(own)
    if space_from(json.loads((deltas / "space.json").read_text())) != adapted.space:
        raise ContractError(f"{plan.step('finetune').label(Adapter)} gave another search space than in training")
    return adapted
