"""A model's modules with a checkpoint's headers loaded into them: transformers' own loading, of tensors without values.

So every name and shape in a checkpoint is held against the modules through the conversions that transformers applies.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sqft.checkpoints.layout import LeftOut
from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.architecture.linears import Transposed, as_stored
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.compat import reverted
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.transformers_io import load_skeleton, silent_transformers, skeleton_with_towers
from sqft.utils.text import shortened

Shapes = Mapping[str, tuple[int, ...]]
OLD_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|masked_bias|position_ids)$")
"""Tensors that older programs stored, and every class computes anew."""


@dataclass(frozen=True)
class Headers:
    """What came of a checkpoint's headers."""

    model: PreTrainedModel
    """On the meta device, after `as_linears`; it knows the conversions that its checkpoint needs."""
    names: CheckpointNames
    problems: tuple[str, ...]
    """Tensors that are missing or mis-shaped."""
    dropped: tuple[LeftOut, ...]
    """Modules and tensors that the class has no place for."""


def load_headers(spec: ModelSpec, shapes: Shapes, codes: bool) -> Headers:
    """Load the headers of a folder into its model's modules, on the meta device.

    Args:
        spec: the folder.
        shapes: shape of every tensor of the float model by its name in the checkpoint.
        codes: whether layers are stored as codes, which are [out, in] in every family.

    Raises:
        ModelError: when transformers cannot make a model of its config.
    """
    model = load_skeleton(spec)
    names = CheckpointNames(model, shapes)
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if codes and (missing := _join_apart(model, names, state)):
        return Headers(model, names, (_lacking(model, missing),), ())
    for name, stored in names.layers.items() if codes else ():
        layer, weight = model.get_submodule(name), state.get(f"{stored}.weight")
        if isinstance(layer, Transposed) and weight is not None and weight.shape == layer.weight.shape:
            state[f"{stored}.weight"] = weight.T
    try:
        with silent_transformers():
            _, info = type(model).from_pretrained(
                None,
                config=model.config,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,  # reported below, by name
                output_loading_info=True,
            )
    except Exception as error:  # a conversion met other shapes, or another number of tensors, than it needs
        return Headers(model, names, (next(_unlike(model, names, shapes), str(error)),), ())
    problems = [_mis_shaped(*mismatch) for mismatch in sorted(info["mismatched_keys"])[:1]]
    if missing := sorted(info["missing_keys"]):
        problems.append(_lacking(model, missing))
    return Headers(model, names, tuple(problems), tuple(_dropped(spec, model, names, shapes, info["unexpected_keys"])))


def _join_apart(model: PreTrainedModel, names: CheckpointNames, state: dict[str, Tensor]) -> list[str]:
    """Join the layers of mixtures that are stored apart, as codes are, where a checkpoint of floats joins them.

    `state` is changed in place; returned are the names of such layers that are missing beside others.
    """
    apart: dict[str, Tensor] = {}
    mixtures: dict[str, list[str]] = {}
    for layer in names.unnamed:
        mixtures.setdefault(layer.rpartition(".")[0].rpartition(".")[0], []).append(layer)
    for layers in mixtures.values():
        stored = {layer: names.name_of_codes(layer) for layer in layers}
        missing = [f"{name}.weight" for name in stored.values() if f"{name}.weight" not in state]
        if len(missing) == len(stored):  # the mixture is no codes
            continue
        if missing:
            return missing
        for layer, name in stored.items():
            for part in ("weight", "bias"):
                if f"{name}.{part}" in state:
                    apart[f"{layer}.{part}"] = state.pop(f"{name}.{part}")
    state |= reverted(model, as_stored(model, state=apart)) if apart else {}
    return []


def _dropped(
    spec: ModelSpec, model: PreTrainedModel, names: CheckpointNames, shapes: Shapes, unexpected: Container[str]
) -> Iterator[LeftOut]:
    """Name the modules that a checkpoint has and the model has not, and single tensors where it has the module.

    Args:
        spec: the folder.
        model: made for it, after `as_linears`.
        names: its names.
        shapes: of the checkpoint's tensors.
        unexpected: the tensors that transformers did not load, without those that the class is known not to use, by
            the names that its modules would have.
    """
    modules, blocks = {name for name, _ in model.named_modules()}, tuple(f"{block}." for block in decoder_blocks(model))
    buffers, prefix = {name for name, _ in model.named_buffers()}, f"{model.base_model_prefix}."
    reader, parts = FolderReader(spec.path), dict[str, list[str]]()
    for name, shape in shapes.items():
        tensor = place = names.module_tensor(name)
        if tensor.split(".")[0] not in modules and prefix + tensor.split(".")[0] in modules:
            place = prefix + tensor  # some checkpoints leave the prefix out
        steps = place.split(".")
        above = (".".join(steps[:depth]) for depth in range(1, len(steps)))
        module = next((module for module in above if module not in modules), "")
        # What a class is known not to use is said as well if it is a whole part of a model: a tower, further heads.
        if tensor in unexpected or (module and not module.startswith(blocks)):
            mask = steps[-1] == "bias" and len(shape) > 2
            if not (mask or place in buffers or OLD_BUFFERS.search(place) or _is_zero_bias(reader, name)):
                parts.setdefault(module or place, []).append(name)
    towers = _tensors_with_towers(spec, shapes) if parts else {}
    for part, tensors in parts.items():
        reason = f"as {type(model).__name__} has no place for it"
        if keeping := next((towers[name] for name in tensors if name in towers), ""):
            reason += f'; config.json names no class that sqft knows: add "architectures": ["{keeping}"] to keep it'
        yield LeftOut(part, sum(math.prod(shapes[name]) for name in tensors), reason)


def _is_zero_bias(reader: FolderReader, name: str) -> bool:
    """Return whether a tensor is a bias that does nothing: some programs write one for every quantized layer."""
    return name.endswith(".bias") and name in reader and not reader.tensor(name).any()


def _tensors_with_towers(spec: ModelSpec, shapes: Shapes) -> dict[str, str]:
    """Return the tensors that the class with towers has, each with its name, where config.json names no class."""
    if (model := skeleton_with_towers(spec)) is None:
        return {}
    names, state = CheckpointNames(model), as_stored(model)
    return {name: type(model).__name__ for name in shapes if names.module_tensor(name) in state}


def _unlike(model: PreTrainedModel, names: CheckpointNames, shapes: Shapes) -> Iterator[str]:
    """Say which tensors that transformers joins differ from those that it would store."""
    expected = {name: tuple(tensor.shape) for name, tensor in reverted(model, as_stored(model)).items()}
    for name in expected.keys() & shapes.keys():
        if expected[name] != tuple(shapes[name]):
            yield _mis_shaped(name, shapes[name], expected[name])
    joined = {names.module_tensor(name) for name in shapes}
    for name in expected.keys() - shapes.keys():
        if names.module_tensor(name) in joined:
            yield _lacking(model, [name])


def _lacking(model: PreTrainedModel, names: list[str]) -> str:
    return f"lacks {shortened(names)}, which {type(model).__name__} has by config.json; copy it again"


def _mis_shaped(name: str, stored: Iterable[int], expected: Iterable[int]) -> str:
    return f"{name} is {list(stored)}, and config.json makes it {list(expected)}; copy it again"
