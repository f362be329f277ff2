"""GPTQ checkpoints, version 1: settings, what their codes need, and the shapes of the float model they encode."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqft.checkpoints.export import write_config
from sqft.errors import ArtifactError, ModelError
from sqft.kernels.words import WORD_BITS, fills_words
from sqft.types import Grid, LinearShape

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The tensors that replace a layer's weight."""

GPTQ_BITS = (2, 3, 4, 8)
"""The bits that a code may have."""

JOINED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers that vLLM and SGLang join into one, whose name alone they look for among the layers left in floats."""

GPTQ_FILE = "quantize_config.json"
"""The file beside `config.json` that auto-gptq reads its settings from."""


def gptq_settings(path: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model folder's config; None when the weights are floats.

    Raises:
        ModelError: when the model is quantized in another format than GPTQ's, version 1, or its bits or group size
            are not valid in GPTQ.
    """
    stated = config.get("quantization_config")
    if stated is None:
        return None
    settings = stated if isinstance(stated, dict) else {}
    method, version = settings.get("quant_method", "unknown method"), settings.get("checkpoint_format") or "gptq"
    if method != "gptq" or version != "gptq":
        raise ModelError(
            f"{path} is already quantized ({method if method != 'gptq' else version}); of quantized models sqft reads "
            "only GPTQ checkpoints, version 1; name one, or the float model it was made from"
        )
    bits, size = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or bits not in GPTQ_BITS or type(size) is not int or (size < 1 and size != -1):
        raise ModelError(
            f"{path / 'config.json'}: quantization_config has bits {bits!r} and group_size {size!r}; GPTQ has bits of "
            "2, 3, 4 or 8, and a group_size of -1 or more than 0; copy the model again"
        )
    return settings


def unpacked_shapes(
    path: Path, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the float model: the parts of each quantized layer become its weight [out, in].

    Args:
        path: The model folder, for messages.
        shapes: Shape of every stored tensor by name.
        settings: The folder's `quantization_config`, as `gptq_settings` returns it.

    Raises:
        ArtifactError: naming a part that is missing or has another shape than the codes need.
    """
    layers = [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    if not layers:
        raise ArtifactError(
            f"{path}: config.json says that the model is quantized, but there is no .qweight tensor; "
            "copy the model again"
        )
    floats = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in GPTQ_PARTS}
    parts_of = {name.rpartition(".")[0] for name in shapes.keys() - floats.keys()}
    if without_codes := sorted(parts_of - set(layers)):
        raise ArtifactError(f"{path}: {without_codes[0]}.qweight is missing; copy the model again")
    for layer in layers:
        floats[f"{layer}.weight"] = _weight_shape(path, layer, shapes, settings)
    return floats


def _weight_shape(
    path: Path, layer: str, shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any]
) -> tuple[int, int]:
    """Return the shape [out, in] of the weight that a layer's parts encode, after checking that they fit together."""
    bits, group_size = settings["bits"], settings["group_size"]
    packed = shapes[f"{layer}.qweight"]
    if len(packed) != 2:
        raise ArtifactError(
            f"{path}: {layer}.qweight is {list(packed)}, expected [words, outputs]; copy the model again"
        )
    words, out = packed
    inputs = words * WORD_BITS // bits
    groups = 1 if group_size == -1 else -(-inputs // group_size)
    expected = {"qzeros": (groups, out * bits // WORD_BITS), "scales": (groups, out), "g_idx": (inputs,)}
    for part, shape in expected.items():
        stored = shapes.get(f"{layer}.{part}")
        if stored is None and part == "g_idx" and not settings.get("desc_act"):
            continue  # groups in order need no index
        if stored != shape:
            problem = "is missing" if stored is None else f"is {list(stored)}"
            raise ArtifactError(f"{path}: {layer}.{part} {problem}, expected {list(shape)}; copy the model again")
    return out, inputs


def gptq_incompatibility(linear: LinearShape, bits: int, group_size: int) -> str | None:
    """Return why a layer's codes cannot be stored in a GPTQ checkpoint; None when they can.

    A quantizer returns it from `incompatibility`, so that the plan says so before anything runs.
    """
    for what, count in (("inputs", linear.in_features), ("outputs", linear.out_features)):
        if not fills_words(count, bits):
            return f"{count} {what} of {bits} bits do not fill the {WORD_BITS}-bit words of a checkpoint"
    if group_size == -1 or linear.in_features % group_size == 0:
        return None
    divisors = [size for size in (128, 64, 32) if linear.in_features % size == 0]
    return (
        f"{linear.in_features} inputs are not a multiple of group_size {group_size}, and no runtime opens such a "
        f"checkpoint; sizes that fit: {', '.join(map(str, [*divisors, -1]))}"
    )


def gptq_config(
    grids: Mapping[str, Grid], floats: Iterable[str], towers: Iterable[str] = (), blocks: str = ""
) -> dict[str, Any]:
    """Return the `quantization_config` of a GPTQ checkpoint, version 1.

    Args:
        grids: The grid of every quantized layer by name. All have the same bits and group size, since the format has
            one of each.
        floats: The linear layers of the decoder blocks that are not quantized. Programs that read these folders have
            two settings for them, and both are written.
        towers: The modules outside the text model, with layers that are not quantized.
        blocks: The module that is the list of the decoder blocks. Programs that read these folders look for it under
            a few names; where there are towers, it is stated.
    """
    return config_of({name: grid_settings(grid) for name, grid in grids.items()}, floats, towers, blocks)


def grid_settings(grid: Grid) -> dict[str, Any]:
    """Return what a `quantization_config` says of a layer's grid."""
    from sqft.kernels.grids import is_symmetric

    return {
        "bits": grid.bits,
        "group_size": grid.group_size,
        "sym": is_symmetric(grid),
        "desc_act": grid.group_index is not None,
    }


def config_of(
    settings: Mapping[str, Mapping[str, Any]], floats: Iterable[str], towers: Iterable[str], blocks: str
) -> dict[str, Any]:
    """Return what `gptq_config` does, given the `grid_settings` of each quantized layer."""
    first = next(iter(settings.values()))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": first["bits"],
        "group_size": first["group_size"],
        "sym": all(of_layer["sym"] for of_layer in settings.values()),
        "desc_act": any(of_layer["desc_act"] for of_layer in settings.values()),
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in settings),
    }
    apart = [f"-:^{re.escape(name)}$" for name in sorted(_with_joined(floats))]
    if apart:
        layers = (name for name in settings if name.rpartition(".")[2] != "lm_head")
        inner = {re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in layers}
        config["modules_in_block_to_quantize"] = [sorted(inner)]
    if names := sorted({name.rpartition(".")[2] for name in towers}):
        # Programs differ in what comes before a tower's own name.
        apart += [rf"-:^(.*\.)?{re.escape(name)}(\.|$)" for name in names]
        config["block_name_to_quantize"] = blocks
    if apart:
        config["dynamic"] = {pattern: {} for pattern in apart}
    return config


def _with_joined(floats: Iterable[str]) -> set[str]:
    """Return the names of layers, and those of joined layers of which they are all parts."""
    names = set(floats)
    parents = {name.rpartition(".")[0] for name in names}
    return names | {
        f"{parent}.{joined}"
        for parent in parents
        for joined, parts in JOINED.items()
        if names.issuperset(f"{parent}.{part}" for part in parts)
    }


def write_gptq_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write a `quantization_config` into the `config.json` of `folder`, and into the file that auto-gptq reads."""
    write_config(folder, quantization_config=config)
    known = {key: config[key] for key in ("bits", "group_size", "sym", "desc_act")}
    known["model_file_base_name"] = "model"  # auto-gptq looks for weights of this name
    (folder / GPTQ_FILE).write_text(json.dumps(known, indent=2) + "\n", "utf-8")
