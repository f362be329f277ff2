"""Find the pre-trained model that a recipe names, and read its headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqft.checkpoints.gguf import gguf_source
from sqft.checkpoints.gptq import gptq_settings, unpacked_shapes
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.packed_floats import check_dequantize, packed_floats
from sqft.checkpoints.safetensors import INDEX, precision_of_most, read_object, tensor_entries, weight_files
from sqft.errors import ArtifactError, ModelError
from sqft.utils.digests import Digests
from sqft.utils.files import unreadable
from sqft.utils.hub import HUB_FILES, HUB_ID, fetch


def find_model(
    path: str, resolve: Callable[[str], Path], revision: str | None, digests: Digests, dequantize: bool | None = False
) -> ModelSource:
    """Return the model that a recipe names: a folder, a GGUF file, or a Hugging Face id.

    Args:
        path: As the recipe has it.
        resolve: Makes a file's path of it, relative to the recipe.
        revision: Branch, tag or commit of a Hugging Face id.
        digests: Computes, and remembers, digests of files.
        dequantize: Whether a folder's weights are MXFP4 or FP8, to be read as floats; None: as its config says.

    Raises:
        SqftError: saying what was looked for, what is wrong with it and how to fix it.
    """
    local = resolve(path)
    try:
        if local.is_file() and local.suffix == ".gguf":
            return gguf_source(local, digests)
        if local.is_dir():
            return folder_source(local, digests, dequantize)
        if local.exists():
            raise ModelError(f"{local} is neither a folder nor a .gguf file")
        if HUB_ID.fullmatch(path):
            return folder_source(fetch("model", path, revision, HUB_FILES, local), digests, dequantize, hub=path)
    except OSError as error:
        raise unreadable(error, local) from None
    raise ModelError(f"no file or folder {local}, and '{path}' is not a Hugging Face id (owner/name)")


def folder_source(path: Path, digests: Digests, dequantize: bool | None = False, hub: str | None = None) -> ModelSource:
    """Return what the headers in a model folder say of its model: floats or GPTQ codes, or with `dequantize` the floats
    that MXFP4 or FP8 stand for; None takes them where they are. `hub` is the id of a folder of the hub's cache.

    Raises:
        ArtifactError: when a file is damaged, or a tensor or file is missing.
        ModelError: when sqft does not read such a folder.
    """
    config = read_object(path / "config.json")
    if (path / "adapter_config.json").is_file():
        raise ModelError(_both(path, hub))
    if dequantize is not None:
        check_dequantize(path, config, dequantize)
    packed = packed_floats(config)
    quantization = None if packed else gptq_settings(path, config)
    files = weight_files(path)
    entries: dict[str, dict[str, Any]] = {}
    for file, listed in files.items():
        found = tensor_entries(file)
        if missing := sorted(listed - found.keys()):
            raise ArtifactError(f"{file} lacks {missing[0]}, which {path / INDEX} lists; copy the model again")
        entries.update(found)
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    precision = precision_of_most((entry["dtype"], entry["shape"]) for entry in entries.values())
    if quantization:
        if stray := sorted(file.name for file in set(path.glob("*.safetensors")) - files.keys()):
            raise ModelError(f"{path} has {stray[0]} beside the weights that transformers reads; move it elsewhere")
        shapes = unpacked_shapes(path, shapes, quantization)
    elif packed:
        shapes = packed.float_shapes(path, shapes)
    elif any(name.endswith(".qweight") for name in shapes):
        raise ModelError(
            f"{path} has packed codes (.qweight), but no quantization_config in its config.json that describes them; "
            "add it, or name the float model"
        )
    return ModelSource(
        "folder",
        path,
        _digest(path, digests),
        shapes,
        quantization=quantization,
        dtype="bfloat16" if packed else precision,
        dequantize=packed is not None,
    )


def _both(path: Path, hub: str | None) -> str:
    """Return what to do about an adapter beside a model; on the hub, only its owner could move it."""
    what = "holds a PEFT adapter beside the model (adapter_config.json), and transformers would load both as one"
    if hub:
        measured = f"sqft eval {hub} --set model.path=BASE --set evaluate.adapter={hub}"
        return f"the hub's {hub} {what}; measure the adapter on its base: {measured}"
    return (
        f"{path} {what}; merge the adapter first, or move its files to a folder of their own, which `sqft eval` "
        "measures on the adapter's base"
    )


def _digest(path: Path, digests: Digests) -> str:
    """Return the digest of a folder's weights, settings, tokenizer and code; other files cannot change a result."""
    total = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file() and any(map(p.match, HUB_FILES))):
        total.update(f"{file.name}\0{digests.file(file)}".encode())
    return total.hexdigest()
