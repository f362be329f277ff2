"""Names in a checkpoint and in a model's modules, through transformers' own conversion of the one into the other.

transformers renames, splits and joins the tensors of many families while it loads and saves them. No list of names is
ours: layers are filled with numbers, transformers turns them into what it would store, and the numbers are looked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.modeling.adapters.frozen_weight import PackedLinear
from sqft.modeling.architecture.blocks import all_linears
from sqft.modeling.architecture.linears import as_stored
from sqft.modeling.compat import converted_name, keep_conversions, reverted, weight_conversions


class CheckpointNames:
    """What the layers and tensors of a model are called in its checkpoints.

    Args:
        model: on any device, after `as_linears`. A model that `from_pretrained` made knows which conversions its
            checkpoint needed, so that no other names are needed.
        stored: the names of all tensors in the checkpoint, those of codes as `….weight`, for a model that was made in
            another way. The model then keeps the conversions, so that `save_pretrained` goes back to these names.
    """

    def __init__(self, model: PreTrainedModel, stored: Iterable[str] = ()) -> None:
        self._model = model
        self._state = as_stored(model, state=_on_meta(model.state_dict()))
        self._conversions = weight_conversions(model)
        self._tensors: dict[str, str] = {}
        if [self.module_tensor(name) for name in stored]:
            keep_conversions(model, [one for one in self._conversions if one.was_used()])

    def module_tensor(self, name: str) -> str:
        """Return the tensor of the modules that a tensor of the checkpoint becomes, or becomes part of."""
        if name not in self._tensors:
            self._tensors[name] = converted_name(self._model, self._conversions, name, self._state)
        return self._tensors[name]

    def checkpoint_name(self, layer: str) -> str:
        """Return the name of a linear layer in the checkpoint: of one expert too, where transformers joins them.

        Raises:
            LookupError: when the layer has no tensor of its own there; the message says why.
        """
        if layer in self.unnamed:
            raise LookupError(self.unnamed[layer])
        return self.layers.get(layer, layer)

    def name_of_codes(self, layer: str) -> str:
        """Return the name that a linear layer has in a checkpoint of codes, which holds experts one by one: its own in
        the checkpoint, or beside its joined experts."""
        return self._apart[layer] if layer in self.unnamed else self.checkpoint_name(layer)

    @cached_property
    def _apart(self) -> dict[str, str]:
        """A layer without a tensor of its own in the checkpoint -> its name beside those that have one."""
        layers = list(self.unnamed)
        marked = {f"{name}.weight": torch.full((2, 2), float(number)) for number, name in enumerate(layers)}
        try:
            stored = reverted(self._model, marked)
        except Exception:  # the same as in `_find`
            return {name: name for name in layers}
        return {layers[int(tensor[0, 0])]: name.removesuffix(".weight") for name, tensor in stored.items()}

    def layer(self, name: str) -> str:
        """Return the linear layer that has this name in the checkpoint: the reverse of `checkpoint_name` and
        `name_of_codes`."""
        return self._layer_of.get(name) or self.module_tensor(f"{name}.weight").removesuffix(".weight")

    @cached_property
    def _layer_of(self) -> dict[str, str]:
        return {stored: layer for layer, stored in self.layers.items()}

    @cached_property
    def linears(self) -> frozenset[str]:
        """All linear layers of the model."""
        modules = self._model.named_modules()
        return frozenset(name for name, module in modules if isinstance(module, nn.Linear | PackedLinear))

    @property
    def layers(self) -> dict[str, str]:
        """A linear layer -> its name in the checkpoint, of all that have one."""
        return self._found[0]

    @property
    def unnamed(self) -> dict[str, str]:
        """A linear layer that has no tensor of its own in the checkpoint -> why."""
        return self._found[1]

    @cached_property
    def _found(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return `layers` and `unnamed`, of the layers in decoder blocks and of the others."""
        inside = all_linears(self._model)
        found = [self._find(list(inside)), self._find(sorted(self.linears - inside.keys()))]
        return found[0][0] | found[1][0], found[0][1] | found[1][1]

    def _find(self, layers: list[str]) -> tuple[dict[str, str], dict[str, str]]:
        """Fill every layer with its number, let transformers store them, and look for the numbers."""
        marked = {f"{name}.weight": torch.full((2, 2), float(number)) for number, name in enumerate(layers)}
        try:
            stored = reverted(self._model, as_stored(self._model, state=marked))
        except Exception as error:  # a conversion that transformers cannot undo, or that needs the layer's own shape
            return {}, dict.fromkeys(layers, f"transformers cannot undo its conversion: {error}")
        named: dict[str, str] = {}
        joined: dict[str, str] = {}
        for name, tensor in stored.items():
            numbers = [int(number) for number in torch.unique(tensor)]
            if len(numbers) == 1 and name.endswith(".weight"):
                named[layers[numbers[0]]] = name.removesuffix(".weight")
            else:
                joined |= {layers[n]: f"its checkpoint holds it in {name}, with others" for n in numbers}
        return named, joined


def _on_meta(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in state.items()}
