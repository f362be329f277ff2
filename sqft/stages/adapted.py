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
from transformers import PreTrainedModel

from sqft.components import checks
from sqft.components.kinds import Adapter, Merger
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.finite import all_finite
from sqft.kernels.masks import unpack_mask
from sqft.modeling.adapters.adapted_linear import attach
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.frozen_weight import FloatWeight, FrozenWeight, PackedLinear, PackedWeight
from sqft.modeling.adapters.saving import space_from
from sqft.modeling.architecture.blocks import all_linears, shape_of
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.loading import load_model, load_packed, load_tokenizer
from sqft.modeling.loading.quantized import read_grids
from sqft.modeling.loading.without_zeros import load_without_zeros
from sqft.planning.adapter_base import AdapterBase
from sqft.planning.plan import Plan
from sqft.ranks import RankConfig, SearchSpace, TrainingStep
from sqft.recipe.sections import Finetune
from sqft.stages.inputs import section_of
from sqft.types import BaseKind, DeltaModule, LinearShape
from sqft.utils.resources import return_freed_memory

DELTAS = "deltas.safetensors"
LOG = "log.jsonl"
"""File of a finetune step: a JSON object a line for each training step, with its loss and ranks, and for each
validation. What came after the deltas that are the result is `discarded`."""


def build_adapted_model(plan: Plan, folders: Mapping[str, Path], seed: int, device: str) -> AdaptedModel:
    """Load the base and attach untrained deltas; `folders` are the step's input artifacts by role.

    Raises:
        ContractError: when the adapter's space or deltas break its contract.
        StageError: when training is to start from floats that were not kept.
    """
    step, base = plan.step("finetune"), plan.adapter_base
    section, adapter, merger = section_of(step, Finetune), step.component(Adapter), step.component(Merger)
    on_codes = base.quantized and not (merger.merges and section.base == "floats")
    spec, masked = plan.spec(base.model(folders)), is_masked(base, merger)
    if on_codes:
        spec = replace(spec, dtype=plan.model_spec.dtype)
        model, tokenizer = load_packed(spec), load_tokenizer(spec)
    elif section.base == "packed":
        model, tokenizer = load_without_zeros(spec, step.streamed, masked)
    else:
        model, tokenizer = load_model(spec)
    found = all_linears(model)
    layers = {name: found[name] for name in step.layers}
    label, shapes = step.label(Adapter), tuple(shape_of(n, layer) for n, layer in layers.items())
    space, deltas = make_deltas(adapter, label, shapes, seed)
    if on_codes:
        masks = base.masks(folders) if merger.merges else None
        residuals = base.residuals(folders) if section.base == "compensated" else None
        weights = _codes(layers, masks, section.mask == "codes", residuals)
    elif base.quantized:
        weights = _floats_before_quantization(plan, folders, model, layers, masked)
    else:
        weights = {
            name: layer.base if isinstance(layer, PackedLinear) else FloatWeight(layer.weight, masked)
            for name, layer in layers.items()
        }
    dropout = checks.check_dropout(label, adapter.input_dropout())
    adapted = attach(model, deltas, merger, weights, dropout, merger.learns_scales())
    model.to(device)
    return AdaptedModel(model, tokenizer, adapted, space)


def is_masked(base: AdapterBase, merger: Merger) -> bool:
    """Return whether what is zero in the base stays zero. A model that came sparse keeps its zeros too: a merger that
    promises to keep them gets a mask of any base."""
    return merger.keeps_mask or base.kind is not BaseKind.DENSE


def make_deltas(
    adapter: Adapter, label: str, shapes: tuple[LinearShape, ...], seed: int
) -> tuple[SearchSpace, dict[str, DeltaModule]]:
    """Make the space of ranks and each layer's untrained delta, and check both against the adapter's contract.

    Args:
        adapter: gives them.
        label: it, as messages name it.
        shapes: of the layers that get one.
        seed: of their random values.

    Raises:
        ContractError: when they break it.
    """
    space = adapter.space(shapes)
    checks.check_space(label, shapes, space)
    ranks = {member: group.ranks for group in space.groups for member in group.members}
    generator = torch.Generator().manual_seed(seed)
    deltas = {}
    for shape in shapes:
        deltas[shape.name] = adapter.delta(shape, generator)
        checks.check_delta(label, shape, deltas[shape.name], ranks[shape.name])
    return space, deltas


def _codes(
    layers: Mapping[str, nn.Module], masks: Path | None, mask_codes: bool, residuals: Path | None
) -> dict[str, FrozenWeight]:
    """Return the layers' own codes as frozen weights; a layer that was left in floats keeps its floats.

    Args:
        layers: by name.
        masks: the file of their masks, if there is one.
        mask_codes: whether a layer that it has no mask for keeps every code but those for 0.
        residuals: the file of their residuals, with which they are the floats that were rounded to the codes.

    Raises:
        StageError: when training is to start from those floats, and the file has none of a layer.
    """
    stored = load_file(masks) if masks else {}
    rests = load_file(residuals) if residuals and residuals.is_file() else {}
    weights: dict[str, FrozenWeight] = {}
    for name, layer in layers.items():
        if isinstance(layer, PackedLinear):
            weights[name] = codes = cast(PackedWeight, layer.base)
            if residuals and name not in rests:
                raise StageError(
                    f"finetune.base: {residuals} has nothing of the floats that were rounded to the codes of {name}; "
                    'set it to "floats" or "codes", or quantize again'
                )
            if residuals:
                codes.set_residual(rests[name])
            if name in stored:
                codes.set_mask(unpack_mask(stored[name], (layer.out_features, layer.in_features)))
            elif mask_codes:
                codes.set_mask(codes.block().weight != 0)
            return_freed_memory()
        else:
            weights[name] = FloatWeight(cast(Tensor, layer.weight), True)
    return weights


def _floats_before_quantization(
    plan: Plan, folders: Mapping[str, Path], model: PreTrainedModel, layers: Mapping[str, nn.Module], masked: bool
) -> dict[str, FrozenWeight]:
    """Return the float weights that were quantized, with the grids they were put on (paper §2.4).

    Args:
        plan: of the run.
        folders: the artifacts before this step, by role.
        model: the base, with the values of its codes.
        layers: its layers to adapt, by name.
        masked: whether what is zero stays zero.
    """
    path = plan.adapter_base.floats(folders)
    assert path is not None
    grids = read_grids(plan.adapter_base.model(folders), layers, CheckpointNames(model))
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


def load_adapted_model(plan: Plan, folders: Mapping[str, Path], finetuned: Path, device: str) -> AdaptedModel:
    """Load the base, and onto it the deltas of the finetune artifact in the folder `finetuned`.

    Raises:
        ArtifactError: when a tensor is missing, mis-shaped or not finite; the message names it.
    """
    adapted = build_adapted_model(plan, folders, 0, device)
    load_deltas(adapted, finetuned, plan.step("finetune").label(Adapter))
    return adapted


def training_steps(finetuned: Path) -> list[TrainingStep]:
    """Return the training steps in a finetune artifact's log; see `sqft.ranks.Evaluate.training`."""
    with (finetuned / LOG).open() as lines:
        entries = [entry for entry in map(json.loads, lines) if "loss" in entry and "discarded" not in entry]
    return [TrainingStep(RankConfig(tuple(entry["ranks"])), entry["loss"]) for entry in entries]


def load_deltas(adapted: AdaptedModel, folder: Path, label: str) -> None:
    """Overwrite everything that trains in an adapted model with what a finetune step wrote into a folder.

    Raises:
        ArtifactError: when a tensor is missing, mis-shaped or not finite; the message names it.
        ContractError: when the adapter, named `label`, gave another search space than in training.
    """
    path = folder / DELTAS
    stored, expected = load_file(path), adapted.deltas()
    if differing := sorted(stored.keys() ^ expected.keys()):
        raise ArtifactError(f"{path} and the adapter disagree about tensor {differing[0]}")
    for name, tensor in stored.items():
        if tensor.shape != expected[name].shape or not all_finite(tensor):
            raise ArtifactError(f"{path}: {name} is mis-shaped or not finite")
    for name, layer in adapted.layers.items():
        layer.load_trainable_tensors({key: stored[f"{name}.{key}"] for key in layer.trainable_tensors()})
    if space_from(json.loads((folder / "space.json").read_text())) != adapted.space:
        raise ContractError(f"{label} gave another search space than in training")
