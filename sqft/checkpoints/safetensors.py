"""Safetensors files and the JSON files beside them, read by their headers."""

from __future__ import annotations

import json
import math
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqft.errors import ArtifactError, ModelError
from sqft.utils.files import write_json, written_whole

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Precisions as the headers of safetensors and GGUF files call them, by torch's names."""
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands in a Git repository for a large one."""


def weight_files(path: Path) -> dict[Path, set[str]]:
    """Return the files that transformers reads a folder's weights from, each with the tensors its index lists there.

    Raises:
        ArtifactError: when the index is damaged or a file that it lists is missing.
        ModelError: when the folder has no weights that transformers would read, or has pickles.
    """
    if (path / WEIGHTS).is_file():
        return {path / WEIGHTS: set()}
    names = sorted(file.name for file in path.iterdir() if file.is_file())
    if INDEX in names:
        file_of = read_object(path / INDEX).get("weight_map")
        if not isinstance(file_of, dict) or not file_of or not all(isinstance(file, str) for file in file_of.values()):
            raise ArtifactError(f"{path / INDEX} has no weight_map of tensors to files; copy the model again")
        if missing := sorted(set(file_of.values()) - set(names)):
            raise ArtifactError(f"{path} lacks {missing[0]}, which {INDEX} lists; copy the model again")
        tensors_in: dict[Path, set[str]] = {}
        for tensor, file in file_of.items():
            tensors_in.setdefault(path / file, set()).add(tensor)
        return tensors_in
    if other := [name for name in names if name.endswith(".safetensors")]:
        raise ModelError(f"{path} has {other[0]}, but neither {WEIGHTS} nor {INDEX}, which transformers looks for")
    if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
        raise ModelError(
            f"{path} has its weights as pickles ({pickles[0]}), which can run code when they are read, so sqft does "
            "not read them; convert them to safetensors with save_pretrained"
        )
    raise ModelError(f"{path} has no .safetensors file; a model folder has config.json and weights")


def safetensors_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors in a safetensors file; raises as `tensor_entries` does."""
    return {name: tuple(entry["shape"]) for name, entry in tensor_entries(path).items()}


def tensor_entries(path: Path) -> dict[str, dict[str, Any]]:
    """Return `dtype`, `shape` and `data_offsets` of the tensors in a safetensors file, from its header alone.

    Raises:
        ArtifactError: when the header is invalid, the file is shorter than the header says, or it only stands for one.
    """
    try:
        header, start = _raw_header(path)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < start + end:
            raise ValueError("the file is shorter than its header says; it was cut off")
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        if bad := [name for name, shape in shapes.items() if not all(type(n) is int and n >= 0 for n in shape)]:
            raise ValueError(f"{bad[0]} has the shape {shapes[bad[0]]!r:.60}")
        if bad := [name for name, entry in header.items() if not isinstance(entry["dtype"], str)]:
            raise ValueError(f"{bad[0]} has the precision {header[bad[0]]['dtype']!r:.60}")
        return header
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, struct.error) as error:
        with path.open("rb") as stream:
            if stream.read(len(LFS_POINTER)) == LFS_POINTER:
                raise ArtifactError(
                    f"{path} is a Git LFS pointer, and not the weights; run `git lfs pull` in its folder"
                ) from None
        cause = error if isinstance(error, ValueError) else "its header is invalid"
        raise ArtifactError(f"{path} is not a complete safetensors file: {cause}; copy it again") from None


def precision_of_most(tensors: Iterable[tuple[str, Iterable[int]]]) -> str | None:
    """Return the precision of most floats among tensors, each given as its `dtype` and shape; None without floats."""
    counts = Counter[str]()
    for dtype, shape in tensors:
        if dtype in FLOATS:
            counts[FLOATS[dtype]] += math.prod(shape)
    return max(counts, key=counts.__getitem__, default=None)


def data_bytes(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file that is known to be complete."""
    return path.stat().st_size - _raw_header(path)[1]


def join(files: Sequence[Path], target: Path) -> None:
    """Write the tensors of several safetensors files, which have no name in common, into one; none is held in memory.

    The files are known to be complete, and `target` is as soon as it exists.
    """
    entries: dict[str, Any] = {}
    starts, size = [], 0
    for file in files:
        header, start = _raw_header(file)
        starts.append(start)
        for name, entry in header.items():
            entries[name] = entry | {"data_offsets": [size + offset for offset in entry["data_offsets"]]}
        size += file.stat().st_size - start
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    with written_whole(target) as temporary, temporary.open("wb") as output:
        output.write(struct.pack("<Q", len(text)) + text)
        for file, start in zip(files, starts, strict=True):
            with file.open("rb") as part:
                part.seek(start)
                shutil.copyfileobj(part, output, 1 << 22)


def write_index(folder: Path, file_of: Mapping[str, str], size: int) -> None:
    """Write the index of a folder whose weights are in several files.

    Args:
        folder: where they are.
        file_of: the name of each tensor's file.
        size: bytes of all tensors.
    """
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(file_of)})


def _raw_header(path: Path) -> tuple[dict[str, Any], int]:
    """Return the entries of the tensors in a file's header, as they are, and where the data begin."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if 8 + length > path.stat().st_size:
            raise ValueError("the header is longer than the file")
        header: dict[str, Any] = json.loads(stream.read(length).decode())
    header.pop("__metadata__", None)
    return header, 8 + length


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file of a model folder that holds an object, such as `config.json`.

    Raises:
        ModelError: naming the file and what is wrong with it.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path.parent} has no {path.name}; a model folder has config.json and weights") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not valid JSON: {error}; copy the model again") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object; copy the model again")
    return content
