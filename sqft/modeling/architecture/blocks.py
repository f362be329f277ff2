"""A model's text model as a list of decoder blocks and the linear layers in them."""

from __future__ import annotations

from collections.abc import Container

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from sqft.errors import ModelError
from sqft.modeling.adapters.frozen_weight import PackedLinear
from sqft.modeling.architecture.experts import count_experts
from sqft.types import LinearShape

ROUTER = "router"
"""A part of a layer's name that says that it decides which experts act on a token."""


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Return the decoder blocks of a model's text model by full name, in order.

    They are the list of modules in its decoder that has as many as the text config has layers; where none has, the
    longest list in the model. A list inside a list, of experts, does not count. Hybrid models have blocks of several
    kinds in one list.

    Raises:
        ModelError: when the model has no such list.
    """
    lists = _outer_lists(model)
    if not lists:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks that calibration can run one by one")
    decoder = text_model(model)
    inside = {id(module) for module in decoder.modules()} if decoder is not None else set()
    count = _layers_by_config(model)
    fitting = [name for name, blocks in lists.items() if id(blocks) in inside and len(blocks) == count]
    chosen = fitting[0] if fitting else max(lists, key=lambda name: len(lists[name]))
    return {f"{chosen}.{index}": block for index, block in enumerate(lists[chosen])}


def block_list(model: nn.Module) -> str:
    """Return the full name of the module that is the list of the decoder blocks."""
    return next(iter(decoder_blocks(model))).rpartition(".")[0]


def text_model(model: nn.Module) -> nn.Module | None:
    """Return the part of a model that reads text, without its head: the model in which its towers are none; None where
    transformers does not say."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        decoder: nn.Module = model.get_decoder()
    except (AttributeError, NotImplementedError):
        return None
    return decoder


def towers(model: PreTrainedModel) -> dict[str, int]:
    """Return what lies outside the text model and its head (towers for images, video and sound, and what joins them to
    the text model), each by full name with its number of weights."""
    decoder, head = text_model(model), model.get_output_embeddings()
    if decoder is None or not {id(block) for block in decoder_blocks(model).values()} <= set(
        map(id, decoder.modules())
    ):
        return {}
    kept = {id(module) for part in (decoder, head) if part is not None for module in part.modules()}
    around = {
        name: module for name, module in model.named_modules() if any(id(inner) in kept for inner in module.modules())
    }
    found: dict[str, int] = {}
    for name, module in around.items():
        if id(module) in kept:
            continue
        inner = {f"{name}.{child}".strip("."): part for child, part in module.named_children()}
        outside = {child: part for child, part in inner.items() if child not in around}
        sizes = {child: sum(p.numel() for p in part.parameters()) for child, part in outside.items()}
        own = {f"{name}.{one}".strip("."): p.numel() for one, p in module.named_parameters(recurse=False)}
        found |= {part: size for part, size in (sizes | own).items() if size}
    return found


def _outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the lists of modules that are in no other list and not empty, by full name, in order."""
    lists: dict[str, nn.ModuleList] = {}
    outer = "\0"
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not name.startswith(f"{outer}."):
            lists[name], outer = module, name
    return lists


def _layers_by_config(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    text = config.get_text_config(decoder=True) if isinstance(config, PretrainedConfig) else None
    return getattr(text, "num_hidden_layers", None)


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


def unquantized(model: nn.Module, quantized: Container[str]) -> list[str]:
    """Return the linear layers in the decoder blocks that are not among the quantized ones, routers included: programs
    that read codes must be told."""
    inside = tuple(f"{block}." for block in decoder_blocks(model))
    layers = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    return [name for name in layers if name.startswith(inside) and name not in quantized]


def _is_router(block: nn.Module, name: str) -> bool:
    """Return whether a layer decides which experts act on a token, or how much: it is named so, or it is a sibling of
    experts and gives one number for each of them, or one in all. Other siblings, such as projections into and out of
    what experts see, are ordinary layers, where it shows how many experts there are."""
    if ROUTER in name.split("."):
        return True
    mixture = getattr(block.get_submodule(name.rpartition(".")[0]), "experts", None)
    if mixture is None:
        return False
    count = count_experts(mixture)
    return count is None or block.get_submodule(name).out_features in (1, count)


def shape_of(name: str, linear: nn.Linear | PackedLinear) -> LinearShape:
    """Return a layer's name and shape."""
    return LinearShape(name, linear.out_features, linear.in_features)
