"""What a plan needs to know of a model, found in its modules: no weight is read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from sqft.checkpoints.gguf import module_shapes
from sqft.checkpoints.layout import LeftOut, ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.narrow import narrow_layers
from sqft.errors import ModelError
from sqft.modeling.architecture.blocks import linears, shape_of, towers
from sqft.modeling.architecture.experts import Expert
from sqft.modeling.architecture.linears import unsplittable_mixtures
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.calibration.dry_run import how_to_walk
from sqft.modeling.loading.headers import Headers, load_headers
from sqft.modeling.loading.transformers_io import check_vocabulary, load_skeleton, load_tokenizer
from sqft.types import LinearShape

SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings")
"""What the plan reads of a text model's config."""


def describe(spec: ModelSpec, source: ModelSource) -> ModelLayout:
    """Return what a model's modules say of its layers, and whether its checkpoint fits them.

    Raises:
        ModelError: when transformers cannot make a model of its config, or it has no decoder blocks.
    """
    headers = _headers(spec, source)
    model, names = headers.model, headers.names
    layers = linears(model)
    shapes = tuple(shape_of(name, layer) for name, layer in layers.items())
    problems = list(headers.problems)
    if source.kind == "gguf":
        problems += _unlike_gguf(shapes, module_shapes(source.shapes))
    else:  # a GGUF file would have to be read completely for its tokenizer
        try:
            check_vocabulary(model, load_tokenizer(spec), spec.path)
        except ModelError as error:
            problems.append(str(error).removeprefix(f"{spec.path}: "))
    walk = how_to_walk(model)
    config = model.config.get_text_config(decoder=True)
    return ModelLayout(
        architecture=type(model).__name__,
        sizes={name: size for name in SIZES if isinstance(size := getattr(config, name, None), int)},
        linears=shapes,
        experts=tuple(name for name, module in model.named_modules() if isinstance(module, Expert)),
        left_out=tuple(_left_out(model)),
        outside=_outside(model),
        narrow=narrow_layers(shapes, _sizes_of_heads(model)),
        walk=walk.way,
        walk_reason=walk.reason,
        unseen=walk.unseen,
        shared=_shared(layers),
        unnamed={n: why for n, why in names.unnamed.items() if n in layers and _is_apart(n, names, source)},
        problems=tuple(problems),
        dropped=headers.dropped,
    )


def _is_apart(layer: str, names: CheckpointNames, source: ModelSource) -> bool:
    """Return whether a layer that checkpoints join with others is stored by itself, or would be when it is quantized:
    a folder of codes has the experts of some mixtures joined."""
    return source.quantization is None or f"{names.name_of_codes(layer)}.weight" in source.shapes


def _headers(spec: ModelSpec, source: ModelSource) -> Headers:
    """Return the model's modules; of a folder, with its headers loaded into them."""
    if source.kind == "folder":
        return load_headers(spec, source.shapes, codes=source.quantization is not None)
    model = load_skeleton(spec)
    return Headers(model, CheckpointNames(model), (), ())


def _unlike_gguf(layers: tuple[LinearShape, ...], stored: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Say which layer is missing from a GGUF file, or mis-shaped, of those whose names there are known."""
    known = {name.split(".", 3)[-1] for name in stored}
    for layer in layers:
        expected = (layer.out_features, layer.in_features)
        if layer.name.split(".", 3)[-1] in known and stored.get(layer.name, expected) != expected:
            yield f"{layer.name} is {list(stored[layer.name])}, and the file's settings make it {list(expected)}"
            return


def _left_out(model: PreTrainedModel) -> Iterator[LeftOut]:
    """Name the parts of a model that sqft never changes, besides embeddings, norms and the head."""
    outside = towers(model)
    for name, weights in outside.items():
        yield LeftOut(name, weights, "outside the text model")
    for name, weights in unsplittable_mixtures(model).items():
        if not any(name.startswith(f"{tower}.") for tower in outside):
            yield LeftOut(name, weights, "experts that cannot be split")


def _outside(model: PreTrainedModel) -> dict[str, str]:
    """Name the head and the embedding, and say what they are."""
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = {names[embedding]: "the embedding"} if embedding in names else {}
    if head in names:
        tied = embedding in names and head.weight is embedding.weight
        named[names[head]] = f"the head, whose weight is that of {names[embedding]}" if tied else "the head"
    return named


def _sizes_of_heads(model: nn.Module) -> dict[str, int]:
    """Return the size of one head of each module that has heads, by full name."""
    sizes = {name: getattr(module, "head_dim", None) for name, module in model.named_modules()}
    return {name: size for name, size in sizes.items() if isinstance(size, int)}


def _shared(layers: Mapping[str, nn.Linear]) -> dict[str, str]:
    """Return the layers whose weight another layer has too, with the first of those."""
    having: dict[int, list[str]] = {}
    for name, layer in layers.items():
        having.setdefault(id(layer.weight), []).append(name)
    return {name: next(n for n in names if n != name) for names in having.values() if len(names) > 1 for name in names}
