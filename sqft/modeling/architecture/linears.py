"""Layers that transformers keeps in a form of their own, as ordinary linear layers, and back for storing.

GPT-2's `Conv1D` holds its weight as [in, out]; a mixture of experts holds the weights of all its experts in two
tensors. Everything else in sqft sees `nn.Linear` alone. `sqft.checkpoints.families` says the same of a checkpoint's
headers: `TRANSPOSED` there faces `Transposed` here, and `_is_plain_mixture` its namesake.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sqft.checkpoints.families import LAYERS_IN_FUSED
from sqft.modeling.compat import gate_of

M = TypeVar("M", bound=nn.Module)


class Transposed(nn.Linear):
    """A `Conv1D` as a linear layer [in] → [out]: stored, its weight is [in, out]."""

    def __init__(self, layer: Conv1D) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.weight.shape
        self.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=False)
        self.bias = layer.bias


class Expert(nn.Module):
    """One expert of a mixture, under the names that checkpoints give its layers."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        super().__init__()
        gate, up = gate_up.chunk(2)
        self.gate_proj, self.up_proj, self.down_proj = _linear(gate), _linear(up), _linear(down)  # LAYERS_IN_FUSED


class Experts(nn.ModuleList):
    """A mixture's experts, each with linear layers of its own; the weights stay where they are.

    With `force_all`, each expert also runs on the tokens that are not routed to it, which changes no result.
    So calibration can measure an expert that its text never reaches.
    """

    def __init__(self, fused: Any) -> None:
        super().__init__(map(Expert, fused.gate_up_proj.detach(), fused.down_proj.detach()))
        del fused.gate_up_proj, fused.down_proj
        vars(self)["gate"] = gate_of(fused)  # only its activation is used, so it is not a submodule
        self.force_all = False

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [tokens, in].

        `hidden_states` is [tokens, in]; `top_k_index` and `top_k_weights` are each token's experts and their weights,
        [tokens, k].
        """
        result = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            assert isinstance(expert, Expert)
            tokens, rank = torch.where(top_k_index == index)  # [routed] each
            if not (len(tokens) or self.force_all or _trains(expert)):
                continue
            rows = torch.arange(len(hidden_states), device=tokens.device) if self.force_all else tokens
            x = hidden_states[rows]  # [routed or tokens, in]
            both = torch.cat([expert.gate_proj(x), expert.up_proj(x)], -1)  # [routed or tokens, 2 · inner]
            y = expert.down_proj(vars(self)["gate"](both))
            y = (y[tokens] if self.force_all else y) * top_k_weights[tokens, rank, None]
            result.index_add_(0, tokens, y.to(result.dtype))
        return result


def as_linears(model: M) -> M:
    """Replace every `Conv1D` by a `Transposed` and every plain mixture by `Experts`, in place; return the model."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            model.set_submodule(name, Transposed(module))
        elif _is_plain_mixture(module):
            model.set_submodule(name, Experts(module))
    return model


def as_stored(model: nn.Module, fused: bool = True, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Return the state dict of a model, or `state` (part of one) in its place, as transformers has its layers; unless
    `fused`, experts stay apart, as checkpoints of codes have them."""
    state = dict(model.state_dict() if state is None else state)
    for name, module in model.named_modules():
        if isinstance(module, Transposed) and f"{name}.weight" in state:
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
        elif isinstance(module, Experts) and fused and f"{name}.0.down_proj.weight" in state:
            for tensor, layers in LAYERS_IN_FUSED.items():
                parts = [
                    [state.pop(f"{name}.{index}.{layer}.weight") for layer in layers] for index in range(len(module))
                ]
                state[f"{name}.{tensor}"] = torch.stack([torch.cat(one) for one in parts])  # [experts, out, in]
    return state


def unsplittable_mixtures(model: nn.Module) -> dict[str, int]:
    """Return the mixtures of experts that `as_linears` cannot take apart, and the number of weights in each."""
    return {
        name: sum(p.numel() for p in module.parameters(recurse=False) if p.dim() == 3)
        for name, module in model.named_modules()
        if _is_mixture(module)
    }


@contextmanager
def route_all_tokens(module: nn.Module) -> Iterator[None]:
    """Run every expert on every token."""
    mixtures = [inner for inner in module.modules() if isinstance(inner, Experts)]
    for mixture in mixtures:
        mixture.force_all = True
    try:
        yield
    finally:
        for mixture in mixtures:
            mixture.force_all = False


def _trains(expert: Expert) -> bool:
    """Return whether an expert's adapters need a gradient, of 0 where no token comes: processes that train together
    wait for the gradients of all."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in expert.parameters())


def _linear(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _is_mixture(module: nn.Module) -> bool:
    """Return whether a module holds the weights of several experts in one tensor [experts, …]."""
    return "expert" in type(module).__name__.lower() and any(p.dim() == 3 for p in module.parameters(recurse=False))


def _is_plain_mixture(module: Any) -> bool:
    """Return whether a mixture has the usual form, which can be taken apart: gate and up in one tensor
    [experts, 2 · inner, in], down in another [experts, in, inner], and no biases."""
    return (
        _is_mixture(module)
        and getattr(module, "has_gate", False)
        and getattr(module, "is_concatenated", False)
        and not (module.has_bias or module.is_transposed or module.has_post_expert_norm)
        and {name for name, _ in module.named_parameters()} == set(LAYERS_IN_FUSED)
    )
