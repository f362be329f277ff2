"""A causal language model as a list of decoder blocks and the linear layers in them.

`sqft.checkpoints.families` says the same of a checkpoint's headers, without torch, for the plan.
"""

from __future__ import annotations

from torch import nn

from sqft.checkpoints.families import ROUTER
from sqft.errors import ModelError
from sqft.modeling.adapters.frozen_weight import PackedLinear
from sqft.types import LinearShape


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's decoder blocks by full name, in order: its longest list of modules that is in no other list.

    Hybrid models have blocks of several kinds in one list.

    Raises:
        ModelError: when the model has no such list.
    """
    longest: tuple[str, nn.ModuleList] | None = None
    outer = "\0"
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or not len(module):
            continue
        if name.startswith(f"{outer}."):  # a block's own list, of experts
            continue
        outer = name
        if longest is None or len(module) > len(longest[1]):
            longest = (name, module)
    if longest is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks that calibration can run one by one")
    return {f"{longest[0]}.{index}": block for index, block in enumerate(longest[1])}


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Return every linear layer of floats inside the decoder blocks, by full name, in order; no router."""
    return {name: layer for name, layer in all_linears(model).items() if isinstance(layer, nn.Linear)}


def all_linears(model: nn.Module) -> dict[str, nn.Linear | PackedLinear]:
    """Return every linear layer inside the decoder blocks, of floats or of codes, by full name, in order; no router."""
    return {
        f"{block_name}.{name}": module
        for block_name, block in decoder_blocks(model).items()
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | PackedLinear) and not _is_router(block, name)
    }


def _is_router(block: nn.Module, name: str) -> bool:
    """Return whether a layer decides which experts act on a token, or how much: it is a sibling of the experts."""
    return ROUTER in name.split(".") or hasattr(block.get_submodule(name.rpartition(".")[0]), "experts")


def shape_of(name: str, linear: nn.Linear | PackedLinear) -> LinearShape:
    """Return a layer's name and shape."""
    return LinearShape(name, linear.out_features, linear.in_features)
