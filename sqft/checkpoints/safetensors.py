"""Safetensors files and the JSON files beside them, read by their headers."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from sqft.errors import ArtifactError, SqftError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_files(path: Path) -> dict[Path, set[str]]:
    """The files that transformers reads a folder's weights from, and the tensors that an index puts there."""
    if (path / WEIGHTS).is_file():
        return {path / WEIGHTS: set()}
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    if INDEX in names:
        places = read_object(path / INDEX).get("weight_map")
        if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
            raise ArtifactError(f"{path / INDEX} has no weight_map of tensors to files; copy the model again")
        if missing := sorted(set(places.values()) - set(names)):
            raise ArtifactError(f"{path} lacks {missing[0]}, which {INDEX} names; copy the model again")
        promised: dict[Path, set[str]] = {}
        for tensor, file in places.items():
            promised.setdefault(path / file, set()).add(tensor)
        return promised
    if other := [name for name in names if name.endswith(".safetensors")]:
        raise SqftError(f"{path} holds {other[0]}, but neither {WEIGHTS} nor {INDEX}, which transformers looks for")
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        raise SqftError(
            f"{path} holds its weights as pickles ({pickles[0]}), which can run code when read and are "
            "refused; convert them to safetensors with save_pretrained"
        )
    raise SqftError(f"{path} holds no .safetensors file; a model folder has config.json and weights")


def safetensors_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        ArtifactError: when the header is not one, or the file is shorter than it says.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if 8 + length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length).decode())
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ValueError("the file is shorter than its header says; it was cut off")
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        if odd := [name for name, shape in shapes.items() if not all(type(n) is int and n >= 0 for n in shape)]:
            raise ValueError(f"{odd[0]} has the shape {shapes[odd[0]]!r:.60}")
        return shapes
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        said = error if isinstance(error, ValueError) else "its header is none"
        raise ArtifactError(f"{path} is no whole safetensors file: {said}; copy it again") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file of a model's folder, which holds an object.

    Raises:
        SqftError: naming the file and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise SqftError(f"{path.parent} has no {path.name}; a model folder has config.json and weights") from None
    except (ValueError, RecursionError) as error:
        raise SqftError(f"{path} is not valid JSON: {error}; copy the model again") from None
    if not isinstance(content, dict):
        raise SqftError(f"{path} is not a JSON object; copy the model again")
    return content
