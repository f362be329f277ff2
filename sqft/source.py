"""What a recipe brings from outside, seen without torch: models by their headers, files by content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sqft.contracts import LinearShape
from sqft.errors import ArtifactError, SqftError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
"""What is fetched of a Hugging Face id: never a pickle."""
GGUF_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""GGUF's names of a Llama block's linear layers, as transformers calls them."""


class Digests:
    """SHA-256 of files, remembered by (path, size, mtime_ns, inode) in `memory` when it can be written."""

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory

    @cached_property
    def _known(self) -> dict[str, str]:
        try:
            assert self._memory is not None
            known = json.loads(self._memory.read_text())
            return known if isinstance(known, dict) else {}
        except (AssertionError, OSError, ValueError):
            return {}

    def file(self, path: Path) -> str:
        """The hexadecimal digest of one file's content."""
        path = path.resolve()
        state = path.stat()
        key = f"{path}|{state.st_size}|{state.st_mtime_ns}|{state.st_ino}"
        if key not in self._known:
            with path.open("rb") as stream:
                self._known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            self._remember()
        return self._known[key]

    def path(self, path: Path) -> str:
        """The digest of a file, or of every file below a folder."""
        if path.is_dir():
            return "".join(self.file(file) for file in sorted(path.rglob("*")) if file.is_file())
        return self.file(path)

    def _remember(self) -> None:
        if self._memory is None or not self._memory.parent.is_dir():
            return
        temporary = self._memory.with_name(f".{self._memory.name}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self._memory)
        except OSError:
            temporary.unlink(missing_ok=True)


@dataclass(frozen=True)
class ModelSource:
    """A pre-trained model that was found: where it lies and what its headers say."""

    kind: Literal["folder", "gguf", "hub"]
    path: Path
    digest: str
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    linears: tuple[LinearShape, ...]
    """The linear layers of its decoder blocks, by their names in transformers."""

    @property
    def parameters(self) -> int:
        return sum(_product(shape) for shape in self.shapes.values())

    def size(self, *names: str, default: int = 0) -> int:
        """The first of these numbers that the config has ("hidden_size", …)."""
        return next((int(self.config[name]) for name in names if self.config.get(name)), default)


def find_model(path: str, resolve: Callable[[str], Path], revision: str | None, digests: Digests) -> ModelSource:
    """The model a recipe names: a folder, a GGUF file, or a Hugging Face id.

    Raises:
        SqftError: saying what was looked for and how to mend it.
    """
    place = resolve(path)
    if place.is_file() and place.suffix == ".gguf":
        return _gguf(place, digests)
    if place.is_dir():
        return _folder(place, digests)
    if place.exists():
        raise SqftError(f"{place} is neither a folder nor a .gguf file")
    if HUB_ID.fullmatch(path):
        return _hub(path, revision, digests)
    raise SqftError(f"no file or folder {place}, and '{path}' is no Hugging Face id (owner/name)")


def _folder(path: Path, digests: Digests) -> ModelSource:
    config = _json(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in path.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
        if pickles:
            raise SqftError(
                f"{path} holds its weights as pickles ({pickles[0]}), which can run code when read and are "
                "refused; convert them to safetensors with save_pretrained"
            )
        raise SqftError(f"{path} holds no .safetensors file; a model folder has config.json and weights")
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        shapes.update(safetensors_header(file))
    total = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if any(p.match(pattern) for pattern in HUB_FILES)):
        total.update(f"{file.name}\0{digests.file(file)}".encode())
    return ModelSource("folder", path, total.hexdigest(), config, shapes, _linears(shapes))


def _hub(name: str, revision: str | None, digests: Digests) -> ModelSource:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SqftError(f"the Hugging Face model '{name}' cannot be had, here or from the hub: {reason}") from None
    return _folder(folder, digests)


def _gguf(path: Path, digests: Digests) -> ModelSource:
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SqftError("reading a GGUF file needs the package gguf: pip install 'sqft[gguf]'") from None
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, OSError) as error:
        raise SqftError(f"{path} is no readable GGUF file: {error}") from None
    shapes = {str(t.name): tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}

    def value(key: str) -> Any:
        field = reader.get_field(key)
        return field.contents() if field is not None else None

    family = value("general.architecture")
    config = {
        "model_type": family,
        "hidden_size": value(f"{family}.embedding_length"),
        "intermediate_size": value(f"{family}.feed_forward_length"),
        "num_hidden_layers": value(f"{family}.block_count"),
        "max_position_embeddings": value(f"{family}.context_length"),
        "vocab_size": shapes.get("token_embd.weight", (0,))[0],
    }
    named: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        if match and match[2] in GGUF_LINEARS:
            named[f"model.layers.{match[1]}.{GGUF_LINEARS[match[2]]}.weight"] = shape
    return ModelSource("gguf", path, digests.file(path), config, shapes, _linears(named))


def _linears(shapes: dict[str, tuple[int, ...]]) -> tuple[LinearShape, ...]:
    """Two-dimensional weights below a numbered block: a guess from names, which the run checks."""
    found = [
        LinearShape(name.removesuffix(".weight"), shape[0], shape[1])
        for name, shape in shapes.items()
        if len(shape) == 2 and re.search(r"\.\d+\..*\.weight$", name)
    ]
    return tuple(sorted(found, key=lambda linear: [int(t) if t.isdigit() else t for t in linear.name.split(".")]))


def safetensors_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        ArtifactError: when the header is not one, or the file is shorter than it says.
    """
    try:
        with path.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > path.stat().st_size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        if path.stat().st_size < 8 + length + end:
            raise ValueError("the file is shorter than its header says; it was cut off")
        return {name: tuple(entry["shape"]) for name, entry in header.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise ArtifactError(f"{path} is no whole safetensors file: {error}") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SqftError(f"{path} cannot be read: {error.strerror}; a model folder has a config.json") from None
    except ValueError as error:
        raise SqftError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise SqftError(f"{path} is not a JSON object")
    return content


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
