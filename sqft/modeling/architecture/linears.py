"""Layers that transformers keeps in a form of their own, as ordinary linear layers, and back for storing.

GPT-2's `Conv1D` holds its weight as [in, out]; a mixture of experts holds the weights of all its experts in two
tensors (`experts`). Everything else in sqft sees `nn.Linear` alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sqft.modeling.architecture.experts import Experts, as_experts, is_mixture

M = TypeVar("M", bound=nn.Module)


class Transposed(nn.Linear):
    """A `Conv1D` as a linear layer [in] → [out]: stored, its weight is [in, out]."""

    stored_transposed = True

    def __init__(self, layer: Conv1D) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.weight.shape
        self.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = layer.bias


def stored_transposed(linear: nn.Module) -> bool:
    """Return whether transformers stores a linear layer's weight as [in, out]."""
    return bool(getattr(linear, "stored_transposed", False))


def as_linears(model: M) -> M:
    """Replace every `Conv1D` by a `Transposed` and every mixture that can be taken apart by `Experts`, in place; return
    the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, Transposed(module))
        elif (experts := as_experts(module)) is not None:
            model.set_submodule(name, experts)
    return model


def as_stored(
    model: nn.Module, codes: Collection[str] = (), state: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return the state dict of a model, or `state` (part of one) in its place, as transformers has its layers.

    Experts of which a layer is among `codes` stay apart, as checkpoints of codes have them.
    """
    state = dict(model.state_dict() if state is None else state)
    for name, module in model.named_modules():
        if isinstance(module, Transposed) and f"{name}.weight" in state:
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
        elif isinstance(module, Experts) and not any(layer.startswith(f"{name}.") for layer in codes):
            for tensor in sorted(module.form.tensors):
                inner = module.form.parts(tensor)
                if f"{name}.0.{inner[0]}" in state:
                    of_all = {
                        part: torch.stack([state.pop(f"{name}.{index}.{part}") for index in range(module.count)])
                        for part in inner
                    }
                    state[f"{name}.{tensor}"] = module.form.join(tensor, of_all)
    return state


def from_stored(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Bring tensors into the form of the model's linear layers, in place: what `as_stored` did, undone. Layers that are
    not in `state`, or are experts that stayed apart, are left alone."""
    for name, module in model.named_modules():
        if isinstance(module, Transposed) and f"{name}.weight" in state:
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
        elif isinstance(module, Experts):
            for tensor in sorted(module.form.tensors):
                if f"{name}.{tensor}" in state:
                    for inner, of_all in module.form.split(tensor, state.pop(f"{name}.{tensor}")):
                        state |= {f"{name}.{index}.{inner}": one.contiguous() for index, one in enumerate(of_all)}


def put_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Give a model a tensor in the place of its parameter or buffer of that name; a parameter does not train."""
    owner, _, part = name.rpartition(".")
    module = model.get_submodule(owner)
    setattr(module, part, nn.Parameter(tensor, requires_grad=False) if part in module._parameters else tensor)


def layers_of_stored(model: nn.Module) -> dict[str, list[str]]:
    """Return the tensors that transformers has in a form of its own, each with those of the linear layers it is made
    of: what `as_stored` needs at once."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Transposed):
            found[f"{name}.weight"] = [f"{name}.weight"]
        elif isinstance(module, Experts):
            for tensor in sorted(module.form.tensors):
                parts = module.form.parts(tensor)
                found[f"{name}.{tensor}"] = [f"{name}.{i}.{part}" for i in range(module.count) for part in parts]
    return found


def unsplittable_mixtures(model: nn.Module) -> dict[str, int]:
    """Return the mixtures of experts that `as_linears` cannot take apart, and the number of weights in each."""
    return {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p.dim() >= 2)
        for name, module in model.named_modules()
        if is_mixture(module)
    }


def tie(model: nn.Module, pairs: Mapping[str, str]) -> None:
    """Make one parameter of each of these pairs: the one that is there, and not on the meta device."""
    for names in [*pairs.items()] * 2:  # the second time, what the last pair brought reaches the first, too
        pair = [model.get_parameter(name) for name in names]
        there = next((one for one in pair if not one.is_meta), pair[1])
        for name in names:
            owner, _, part = name.rpartition(".")
            setattr(model.get_submodule(owner), part, there)
