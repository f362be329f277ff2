"""Mixtures of experts: transformers keeps the weights of all experts in two tensors; here each expert has layers of its
own.

Families differ in how they lay these tensors out (`Form`) and in how they call the mixture (`Experts`,
`SortedExperts`). Both are read from traits of the module; no family is named.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sqft.modeling.compat import apply_gate_of, traits_of_experts

GATED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""The tensors of a mixture whose experts have a gate, and the layers of an expert that each is made of."""

UNGATED = {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""The same where an expert has two matrices and no gate."""


@dataclass(frozen=True)
class Form:
    """How a mixture lays out the weights of its experts.

    Args:
        layers: `GATED` or `UNGATED`.
        transposed: whether weights are [experts, in, out] instead of [experts, out, in].
        interleaved: whether the outputs of gate and up alternate; otherwise the gate's come first.
        biased: whether beside each tensor there is a NAME_bias [experts, out].
    """

    layers: Mapping[str, tuple[str, ...]]
    transposed: bool = False
    interleaved: bool = False
    biased: bool = False

    @property
    def tensors(self) -> set[str]:
        """The names of all tensors of the mixture."""
        return {*self.layers, *(f"{name}_bias" for name in self.layers if self.biased)}

    def parts(self, name: str) -> list[str]:
        """Return the tensors of an expert that one of the mixture's is made of: "gate_proj.weight", …"""
        part = "bias" if name.endswith("_bias") else "weight"
        return [f"{layer}.{part}" for layer in self.layers[name.removesuffix("_bias")]]

    def split(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Split one of the mixture's tensors: yield its `parts`, of all experts: [experts, out, in], or of a bias
        [experts, out]."""
        parts = self.parts(name)
        rows = tensor.mT if self._is_transposed(name) else tensor  # [experts, layers · out, …]
        each = [rows[:, i :: len(parts)] for i in range(len(parts))] if self.interleaved else rows.chunk(len(parts), 1)
        yield from zip(parts, each, strict=True)

    def join(self, name: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Join what `split` gave of a tensor, bit for bit."""
        rows = self.alternate([parts[part] for part in self.parts(name)])
        return rows.mT.contiguous() if self._is_transposed(name) else rows

    def _is_transposed(self, name: str) -> bool:
        return self.transposed and not name.endswith("_bias")

    def alternate(self, outputs: Sequence[Tensor]) -> Tensor:
        """Join outputs of gate and up, [tokens, inner] each, in the order that the mixture's activation expects."""
        return torch.stack(list(outputs), 2).flatten(1, 2) if self.interleaved else torch.cat(list(outputs), 1)


class Expert(nn.Module):
    """One expert of a mixture, under the names that checkpoints give its layers.

    `tensors` are its weights [out, in] and biases [out], by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, weight in tensors.items():
            layer, _, part = name.partition(".")
            if part == "weight":
                setattr(self, layer, _linear(weight, tensors.get(f"{layer}.bias")))


class Experts(nn.Module):
    """A mixture's experts, each with linear layers of its own; weights that lie in one piece stay where they are.

    With `force_all`, each expert also runs on the tokens that are not routed to it, which changes no result.
    So calibration can measure an expert that its text never reaches.
    """

    def __init__(self, fused: Any, form: Form) -> None:
        super().__init__()
        self.form, self.force_all = form, False
        tensors: dict[str, Tensor] = {}
        for name in sorted(form.tensors):
            tensors |= form.split(name, getattr(fused, name).detach())
            delattr(fused, name)
        self.count = len(next(iter(tensors.values())))
        for index in range(self.count):
            self.add_module(str(index), Expert({name: of_all[index] for name, of_all in tensors.items()}))
        for name, module in fused.named_children():  # a norm after each expert
            if any(True for _ in module.parameters()):
                self.add_module(name, module)
        vars(self)["activation"] = _activation(fused, form)  # no submodule: it holds the emptied mixture

    def experts(self) -> Iterator[Expert]:
        """Yield the experts in order."""
        for index in range(self.count):
            expert = self.get_submodule(str(index))
            assert isinstance(expert, Expert)
            yield expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return the weighted sum of each token's experts, [tokens, in].

        `hidden_states` is [tokens, in]; `top_k_index` and `top_k_weights` are each token's experts and their weights,
        [tokens, k].
        """
        precision = torch.promote_types(hidden_states.dtype, top_k_weights.dtype)
        result = torch.zeros_like(hidden_states, dtype=precision)
        for index, expert in enumerate(self.experts()):
            tokens, rank = torch.where(top_k_index == index)  # [routed] each
            y = self._outputs(expert, hidden_states, tokens)
            if y is not None:
                result.index_add_(0, tokens, (y * top_k_weights[tokens, rank, None]).to(precision))
        return result.to(hidden_states.dtype)

    def _outputs(self, expert: Expert, states: Tensor, tokens: Tensor) -> Tensor | None:
        """Return what an expert makes of these of the tokens, [routed, in]; None where it need not run."""
        if self.force_all:
            return self._run(expert, states)[tokens]
        return self._run(expert, states[tokens]) if len(tokens) or _trains(expert) else None

    def _run(self, expert: Any, x: Tensor) -> Tensor:
        """Run an expert on tokens, [tokens, in] → [tokens, in]."""
        outputs = [getattr(expert, layer)(x) for layer in next(iter(self.form.layers.values()))]  # [tokens, inner] each
        y: Tensor = expert.down_proj(vars(self)["activation"](self.form.alternate(outputs)))
        norm = self._modules.get("post_expert_norm")
        return y if norm is None else norm(y)


class SortedExperts(Experts):
    """A mixture that is called with every token for every expert, already weighted: zeros where it is not routed to."""

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """Return each expert's outputs, [experts · tokens, in], for its inputs of the same shape."""
        inputs = hidden_states.view(self.count, -1, hidden_states.shape[-1])
        result = torch.zeros_like(inputs)
        for index, expert in enumerate(self.experts()):
            routed = inputs[index].any(-1)  # [tokens]
            states = inputs[index]
            if self.force_all:  # what its own experts are given of a token, which has another weight
                states = torch.where(routed[:, None], states, inputs.sum(0))
            tokens = torch.where(routed)[0]
            y = self._outputs(expert, states, tokens)
            if y is not None:
                result[index] = result[index].index_add(0, tokens, y.to(result.dtype))
        return result.view_as(hidden_states)


def as_experts(mixture: nn.Module) -> Experts | None:
    """Take a mixture apart: return its experts as a module to put in its place, and leave it without weights. Return
    None, and leave it as it is, when it has another form than those known here."""
    form = _form_of(mixture)
    if form is None:
        return None
    return (SortedExperts if _is_given_sorted(mixture) else Experts)(mixture, form)


def is_mixture(module: nn.Module) -> bool:
    """Return whether a module holds the weights of several experts in tensors of its own."""
    named = "expert" in type(module).__name__.lower() and not isinstance(module, nn.Linear)
    return named and any(parameter.dim() >= 2 for parameter in module.parameters(recurse=False))


def count_experts(mixture: nn.Module) -> int | None:
    """Return the number of experts in a mixture, taken apart or not; None where it does not show."""
    if isinstance(mixture, nn.ModuleList | Experts):
        return mixture.count if isinstance(mixture, Experts) else len(mixture)
    return next((len(tensor) for tensor in mixture.parameters() if tensor.dim() == 3), None)


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


def _form_of(mixture: nn.Module) -> Form | None:
    """Return the form of a mixture; None when it is none, or none that can be taken apart.

    Of experts with a gate, the shapes say whether weights are transposed; transformers' own traits must agree.
    """
    shapes = {name: tuple(parameter.shape) for name, parameter in mixture.named_parameters(recurse=False)}
    layers = GATED if "gate_up_proj" in shapes else UNGATED
    first, down = (shapes.get(name, ()) for name in layers)
    traits = traits_of_experts(mixture)
    if not (is_mixture(mixture) and len(first) == len(down) == 3 and first[0] == down[0]):
        return None
    if traits is None and not (apply_gate_of(mixture) or _is_given_sorted(mixture)):
        return None  # what it does between its matrices is not known
    parts = len(next(iter(layers.values())))
    transposed = first[1:] == (down[2], parts * down[1]) and (layers is GATED or bool(traits and traits.transposed))
    form = Form(layers, transposed, bool(traits and traits.interleaved), f"{next(iter(layers))}_bias" in shapes)
    fits = transposed or first[1:] == (parts * down[2], down[1])
    declared = traits is None or (traits.gated, traits.transposed, traits.biased) == (
        layers is GATED,
        transposed,
        form.biased,
    )
    return form if fits and declared and shapes.keys() == form.tensors and not [*mixture.buffers()] else None


def _is_given_sorted(mixture: nn.Module) -> bool:
    """Return whether a mixture is called with hidden states alone: its inputs are sorted by expert."""
    return len(inspect.signature(type(mixture).forward).parameters) == 2  # self, hidden_states


def _activation(fused: Any, form: Form) -> Any:
    """Return what a mixture does between an expert's first and last matrices, [tokens, …] → [tokens, inner]."""
    if form.layers is UNGATED:
        return fused.act_fn
    return apply_gate_of(fused) or (lambda both: _gated(fused.act_fn, both))


def _gated(act: Any, both: Tensor) -> Tensor:
    gate, up = both.chunk(2, -1)
    product: Tensor = act(gate) * up
    return product


def _trains(expert: Expert) -> bool:
    """Return whether an expert's adapters need a gradient, of 0 where no token comes: processes that train together
    wait for the gradients of all."""
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in expert.parameters())


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return layer
