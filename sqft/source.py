"""What a recipe brings from outside, seen without torch: models by their headers, files by content."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sqft.contracts import LinearShape
from sqft.errors import ArtifactError, SqftError
from sqft.layers import guess_linears

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
HUB_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "*.py"]
"""What is fetched of a Hugging Face id, and what a folder's digest is of: never a pickle. Code runs only when the
recipe trusts it, and then it makes the result."""
PACKED = ("", ".gz", ".bz2", ".xz")
DATA_FILES = [
    "*.parquet",
    "*.arrow",
    *(f"*.{kind}{packed}" for kind in ("jsonl", "json", "csv") for packed in PACKED),
    "README.md",
]
"""What is fetched of a data set; its card says which file belongs to which split."""
TEXT_FILES = [f"*.txt{packed}" for packed in PACKED]
"""What is fetched of a data set besides, where its card names such a file or there is no other: a licence or a list of
requirements would be taken for data."""
NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files of these names say something of the data."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
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
GGUF_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")
GPTQ_PARTS = ("qweight", "qzeros", "scales", "g_idx")
"""The tensors that GPTQ's checkpoints have in the place of a layer's weight."""
SETTLED = 2 * 10**9  # nanoseconds: the coarsest clock of a file system in use, FAT's


class Digests:
    """SHA-256 of files, remembered in `memory` when it can be written.

    A file is known again by path, size, times and inode. One that changed within `SETTLED` is read again: a change
    within one tick of the file system's clock would not show.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory

    @cached_property
    def _known(self) -> dict[str, str]:
        try:
            assert self._memory is not None
            known = json.loads(self._memory.read_text("utf-8"))
            return {key: digest for key, digest in known.items() if isinstance(digest, str)}
        except (AssertionError, AttributeError, OSError, ValueError):
            return {}

    def file(self, path: Path) -> str:
        """The hexadecimal digest of one file's content."""
        path = path.resolve()
        state = path.stat()
        key = f"{path}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}|{state.st_ino}"
        settled = time.time_ns() - state.st_ctime_ns >= SETTLED
        if settled and key in self._known:
            return self._known[key]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if settled:
            self._known[key] = digest
            self._remember()
        return digest

    def path(self, path: Path) -> str:
        """The digest of a file, or of every file below a folder by its name there, but for hidden ones and the store.

        Raises:
            SqftError: when something cannot be read.
        """
        try:
            if not path.is_dir():
                return self.file(path)
            total, folder = hashlib.sha256(), path.resolve()
            store = self._memory.parent.resolve() if self._memory else None
            own = store if store and folder in store.parents else None  # what sqft itself writes
            for file in sorted(path.rglob("*")):
                name = file.relative_to(path)
                # Editors and running code write hidden files.
                hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
                if file.is_file() and not hidden and own not in (folder / name).parents:
                    total.update(f"{name.as_posix()}\0{self.file(file)}\0".encode())
            return total.hexdigest()
        except OSError as error:
            raise _unreadable(error, path) from None

    def _remember(self) -> None:
        if self._memory is None:
            return
        temporary = self._memory.with_name(f".{self._memory.name}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self._memory)
        except OSError:  # a store that may not be written serves as it is
            with suppress(OSError):
                temporary.unlink()


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
    quantization: dict[str, Any] | None = None
    """A GPTQ checkpoint's `quantization_config`; None when the weights are floats."""

    @property
    def parameters(self) -> int:
        return sum(_product(shape) for shape in self.shapes.values())

    def size(self, *names: str, default: int = 0) -> int:
        """The first of these numbers that the config has ("hidden_size", …); one that differs by layer is none."""
        found = (self.config.get(name) for name in names)
        return next((value for value in found if isinstance(value, int) and value), default)


def find_model(path: str, resolve: Callable[[str], Path], revision: str | None, digests: Digests) -> ModelSource:
    """The model a recipe names: a folder, a GGUF file, or a Hugging Face id.

    Raises:
        SqftError: saying what was looked for and how to mend it.
    """
    place = resolve(path)
    try:
        if place.is_file() and place.suffix == ".gguf":
            return _gguf(place, digests)
        if place.is_dir():
            return _folder(place, digests)
        if place.exists():
            raise SqftError(f"{place} is neither a folder nor a .gguf file")
        if HUB_ID.fullmatch(path):
            return _folder(_fetched(path, revision, place, "model", HUB_FILES), digests)
    except OSError as error:
        raise _unreadable(error, place) from None
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
        shapes = _unpacked(path, shapes, quantization)
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


def _unpacked(path: Path, shapes: dict[str, tuple[int, ...]], settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
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


def hub_data(name: str, revision: str | None, place: Path) -> Path:
    """The folder of a Hugging Face data set in the hub's cache, fetched when it is not there: never its code.

    Raises:
        SqftError: when it cannot be had.
    """
    folder = _fetched(name, revision, place, "data set", DATA_FILES)
    card = folder / "README.md"
    settings = card.read_text("utf-8", "replace").split("\n---", 1)[0] if card.is_file() else ""
    if ".txt" in settings or not any(file.is_file() and file.name not in NO_DATA for file in folder.rglob("*")):
        folder = _fetched(name, revision, place, "data set", [*DATA_FILES, *TEXT_FILES])
    return folder


def _fetched(name: str, revision: str | None, place: Path, what: str, files: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    kind = "dataset" if what == "data set" else "model"
    try:
        return Path(snapshot_download(name, repo_type=kind, revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SqftError(
            f"there is no folder {place}, and the Hugging Face {what} '{name}' cannot be had, "
            f"here or from the hub: {reason}"
        ) from None


def _gguf(path: Path, digests: Digests) -> ModelSource:
    def value(key: str) -> Any:
        field = reader.get_field(key)
        return field.contents() if field is not None else None

    try:
        reader = open_gguf(path)
        shapes = {str(t.name): tuple(int(n) for n in reversed(t.shape)) for t in reader.tensors}
        family = value("general.architecture")
        config = {
            "model_type": family,
            "hidden_size": value(f"{family}.embedding_length"),
            "intermediate_size": value(f"{family}.feed_forward_length"),
            "num_hidden_layers": value(f"{family}.block_count"),
            "max_position_embeddings": value(f"{family}.context_length"),
            "vocab_size": shapes.get("token_embd.weight", (0,))[0],
        }
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path} is no whole GGUF file: {error}; copy it again") from None
    if not shapes:
        raise SqftError(f"{path} holds no tensors, only a vocabulary or settings; name the model's own file")
    named: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        match = GGUF_BLOCK.fullmatch(name)
        if match and match[2] in GGUF_LINEARS:
            named[f"model.layers.{match[1]}.{GGUF_LINEARS[match[2]]}.weight"] = shape
    return ModelSource("gguf", path, digests.file(path), config, shapes, guess_linears(named))


def open_gguf(path: Path) -> Any:
    """gguf's reader of a file.

    Raises:
        SqftError: when the package is not installed, or the file is damaged.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise SqftError("reading a GGUF file needs the package gguf: pip install 'sqft[gguf]'") from None
    try:
        return GGUFReader(path)
    except (ValueError, IndexError) as error:
        raise ArtifactError(f"{path} is no whole GGUF file: {error}; copy it again") from None


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


def _unreadable(error: OSError, path: Path) -> SqftError:
    return SqftError(f"{error.filename or path} cannot be read: {error.strerror or error}")


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
