"""A sparse model in memory without its zeros."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.adapters.frozen_weight import PackedLinear, SparseWeight
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import stored_transposed
from sqft.modeling.loading.parts import PartedModel, open_in_parts
from sqft.utils.resources import return_freed_memory


def load_without_zeros(
    spec: ModelSpec, streamed: bool, masked: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model of floats with its tokenizer; each linear layer in its decoder blocks that takes less memory without
    its zeros is a `PackedLinear`.

    Args:
        spec: what to load.
        streamed: whether one decoder block at a time is there with its zeros; otherwise, the whole model is at first.
        masked: whether what is zero stays zero.

    Raises:
        ModelError: when it cannot be loaded.
        ArtifactError: when a tensor is missing or mis-shaped.
    """
    parts, tokenizer = open_in_parts(spec, streamed)
    layers = linears(parts.model)
    first: dict[int, str] = {}
    same_as = {name: first.setdefault(id(linear.weight), name) for name, linear in layers.items()}  # blocks may share
    packed: dict[str, SparseWeight] = {}
    for part in parts.parts:
        if isinstance(parts, PartedModel):
            parts.load(part)
        for name in [name for name in layers if parts.part_of(name) == part]:
            linear = layers.pop(name)
            if same_as[name] == name and SparseWeight.saves_memory(linear.weight):
                packed[name] = SparseWeight(linear.weight, masked)
            if base := packed.get(same_as[name]):
                layer = PackedLinear(base, linear.bias, stored_transposed(linear))
                parts.model.set_submodule(name, layer)
        return_freed_memory()
    return parts.model, tokenizer
