"""Find the pre-trained model that a recipe names, and read its headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from sqft.checkpoints.families import guess_linears
from sqft.checkpoints.gguf import gguf_source
from sqft.checkpoints.gptq import gptq_settings, unpacked_shapes
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.safetensors import INDEX, read_object, safetensors_header, weight_files
from sqft.errors import ArtifactError, SqftError
from sqft.utils.digests import Digests
from sqft.utils.files import unreadable
from sqft.utils.hub import HUB_FILES, HUB_ID, fetched


def find_model(path: str, resolve: Callable[[str], Path], revision: str | None, digests: Digests) -> ModelSource:
    """The model a recipe names: a folder, a GGUF file, or a Hugging Face id.

    Raises:
        SqftError: saying what was looked for and how to mend it.
    """
    place = resolve(path)
    try:
        if place.is_file() and place.suffix == ".gguf":
            return gguf_source(place, digests)
        if place.is_dir():
            return _folder(place, digests)
        if place.exists():
            raise SqftError(f"{place} is neither a folder nor a .gguf file")
        if HUB_ID.fullmatch(path):
            return _folder(fetched(path, revision, place, "model", HUB_FILES), digests)
    except OSError as error:
        raise unreadable(error, place) from None
    raise SqftError(f"no file or folder {place}, and '{path}' is no Hugging Face id (owner/name)")


def _folder(path: Path, digests: Digests) -> ModelSource:
    config = read_object(path / "config.json")
    quantization = gptq_settings(path, config)
    shapes: dict[str, tuple[int, ...]] = {}
    for file, promised in weight_files(path).items():
        header = safetensors_header(file)
        if lacking := sorted(promised - header.keys()):
            raise ArtifactError(f"{file} lacks {lacking[0]}, which {path / INDEX} promises; copy the model again")
        shapes.update(header)
    if quantization:
        if stray := sorted(file.name for file in set(path.glob("*.safetensors")) - weight_files(path).keys()):
            raise SqftError(f"{path} holds {stray[0]} beside the weights that transformers reads; move it elsewhere")
        shapes = unpacked_shapes(path, shapes, quantization)
    elif any(name.endswith(".qweight") for name in shapes):
        raise SqftError(
            f"{path} holds packed codes (.qweight), but its config.json has no quantization_config that says how; "
            "add it, or name the float model"
        )
    total = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file() and any(map(p.match, HUB_FILES))):
        total.update(f"{file.name}\0{digests.file(file)}".encode())
    linears = guess_linears(shapes, str(config.get("model_type")), packed=quantization is not None)
    return ModelSource("folder", path, total.hexdigest(), config, shapes, linears, quantization)
