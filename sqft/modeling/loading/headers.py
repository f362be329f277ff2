"""A model's modules with a checkpoint's headers loaded into them: transformers' own loading, of tensors without values.

So every name and shape in a checkpoint is held against the modules through the conversions that transformers applies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.architecture.linears import Transposed, as_stored
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.compat import reverted
from sqft.modeling.loading.transformers_io import load_skeleton, silent_transformers
from sqft.utils.text import shortened

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Headers:
    """What came of a checkpoint's headers."""

    model: PreTrainedModel
    """On the meta device, after `as_linears`; it knows the conversions that its checkpoint needs."""
    names: CheckpointNames
    problems: tuple[str, ...]
    """Tensors that are missing or mis-shaped."""
    ignored: tuple[str, ...]
    """Tensors that the class does not use."""


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
    ignored = tuple(name for name in shapes if not names.has(name))
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
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
        return Headers(model, names, (next(_unlike(model, names, shapes), str(error)),), ignored)
    problems = [_mis_shaped(*mismatch) for mismatch in sorted(info["mismatched_keys"])[:1]]
    if missing := sorted(info["missing_keys"]):
        problems.append(f"lacks {shortened(missing)}, which {type(model).__name__} has by config.json; copy it again")
    return Headers(model, names, tuple(problems), ignored)


def _unlike(model: PreTrainedModel, names: CheckpointNames, shapes: Shapes) -> Iterator[str]:
    """Say which tensors that transformers joins differ from those that it would store."""
    expected = {name: tuple(tensor.shape) for name, tensor in reverted(model, as_stored(model)).items()}
    for name in expected.keys() & shapes.keys():
        if expected[name] != tuple(shapes[name]):
            yield _mis_shaped(name, shapes[name], expected[name])
    joined = {names.module_tensor(name) for name in shapes}
    for name in expected.keys() - shapes.keys():
        if names.module_tensor(name) in joined:
            yield f"lacks {name}, which {type(model).__name__} has by config.json; copy it again"


def _mis_shaped(name: str, stored: Iterable[int], expected: Iterable[int]) -> str:
    return f"{name} is {list(stored)}, and config.json makes it {list(expected)}; copy it again"
