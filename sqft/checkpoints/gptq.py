"""GPTQ checkpoints, version 1: their settings, and the shapes of the float model they stand for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sqft.checkpoints.export import write_config
from sqft.errors import ArtifactError, SqftError
from sqft.types import Grid

GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The tensors that GPTQ's checkpoints have in the place of a layer's weight."""


def gptq_settings(path: Path, config: dict[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a GPTQ checkpoint, version 1; None when the weights are floats.

    Raises:
        SqftError: when it is another format, or has numbers that GPTQ does not know.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    settings = found if isinstance(found, dict) else {}
    method, version = settings.get("quant_method", "some way"), settings.get("checkpoint_format") or "gptq"
    if method != "gptq" or version != "gptq":
        how = method if method != "gptq" else version
        raise SqftError(
            f"{path} is already quantized ({how}), and of such models only GPTQ checkpoints of version 1 can be read; "
            "name one, or the float model it was made of"
        )
    bits, size = settings.get("bits"), settings.get("group_size")
    if type(bits) is not int or bits not in (2, 3, 4, 8) or type(size) is not int or (size < 1 and size != -1):
        raise SqftError(
            f"{path / 'config.json'}: quantization_config has bits {bits!r} and group_size {size!r}; GPTQ has bits of "
            "2, 3, 4 or 8, and a group_size of -1 or more than 0; copy the model again"
        )
    return settings


def unpacked_shapes(
    path: Path, shapes: dict[str, tuple[int, ...]], settings: dict[str, Any]
) -> dict[str, tuple[int, ...]]:
    """The shapes as the float model has them: a layer's four parts become its weight.

    Raises:
        ArtifactError: naming a part that is missing or does not fit.
    """
    bits, layers = settings["bits"], [name.removesuffix(".qweight") for name in shapes if name.endswith(".qweight")]
    if not layers:
        raise ArtifactError(f"{path} says that it is quantized, but holds no .qweight tensor; copy the model again")
    whole = {name: shape for name, shape in shapes.items() if name.rpartition(".")[2] not in GPTQ_PARTS}
    parts_of = {name.rpartition(".")[0] for name in shapes.keys() - whole.keys()}
    if lone := sorted(parts_of - set(layers)):
        raise ArtifactError(f"{path}: {lone[0]}.qweight is missing; copy the model again")
    for layer in layers:
        if len(codes := shapes[f"{layer}.qweight"]) != 2:
            raise ArtifactError(
                f"{path}: {layer}.qweight is {list(codes)}, expected [words, outputs]; copy the model again"
            )
        words, out = codes
        inputs = words * 32 // bits
        groups = 1 if settings["group_size"] == -1 else -(-inputs // settings["group_size"])
        parts = {"qzeros": (groups, out * bits // 32), "scales": (groups, out), "g_idx": (inputs,)}
        for part, wanted in parts.items():
            found = shapes.get(f"{layer}.{part}")
            if found != wanted and not (part == "g_idx" and found is None and not settings.get("desc_act")):
                has = f"is {list(found)}" if found is not None else "is missing"
                raise ArtifactError(f"{path}: {layer}.{part} {has}, expected {list(wanted)}; copy the model again")
        whole[f"{layer}.weight"] = (out, inputs)
    return whole


GPTQ_FILE = "quantize_config.json"


def write_gptq_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Say in `folder` that its weights are GPTQ codes: in `config.json`, and in the file that auto-gptq reads."""
    write_config(folder, quantization_config=config)
    known = {key: config[key] for key in ("bits", "group_size", "sym", "desc_act")}
    known["model_file_base_name"] = "model"  # it looks for weights of this name
    (folder / GPTQ_FILE).write_text(json.dumps(known, indent=2) + "\n", "utf-8")


def gptq_config(grids: Mapping[str, Grid], floats: Iterable[str]) -> dict[str, Any]:
    """The `quantization_config` of a GPTQ checkpoint, version 1, with layers on these grids.

    `floats` names the linear layers of its blocks that are on none: two programs that read these folders are told of
    them in two ways. All grids have one number of bits and one group size, which is all that the format can say.
    """
    from sqft.kernels.grids import is_symmetric

    first = next(iter(grids.values()))
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": first.bits,
        "group_size": first.group_size,
        "sym": all(map(is_symmetric, grids.values())),
        "desc_act": any(grid.group_index is not None for grid in grids.values()),
        "lm_head": "lm_head" in grids,
    }
    if left := sorted(floats):
        in_block = {re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in grids if name != "lm_head"}
        config["modules_in_block_to_quantize"] = [sorted(in_block)]
        config["dynamic"] = {f"-:^{re.escape(name)}$": {} for name in left}
    return config
