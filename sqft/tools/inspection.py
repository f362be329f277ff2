"""Inspect a model's folder: sparsity, precision, format and size, one tensor in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.checkpoints.gguf import GGUF_BLOCK, GGUF_LINEARS, open_gguf
from sqft.checkpoints.gptq import GPTQ_PARTS, gptq_settings
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.packed_floats import packed_floats
from sqft.checkpoints.safetensors import INDEX, WEIGHTS, read_object, safetensors_header, weight_files
from sqft.errors import ArtifactError, ModelError
from sqft.kernels.grids import group_index
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.experts import Experts
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.loading import load_skeleton
from sqft.modeling.loading.compressed import read_compressed_layer
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import read_layer
from sqft.types import Quantized
from sqft.utils.files import MANIFEST, unreadable
from sqft.utils.progress import Track, silent
from sqft.utils.text import human_size

IN_A_BLOCK = re.compile(r"\.\d+\.(.*\.)?(?!embed|wte|wpe)\w+\.weight$")
"""A weight in a numbered block that is not an embedding table (DeepSeek's last block has one)."""
COMPRESSED_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
"""The tensors that compressed-tensors' "pack-quantized" stores instead of a layer's weight."""
PACKED = ("FP8", "MXFP4")
"""Formats that a recipe reads as floats."""
GGUF_PIECE = 1 << 24
"""Weights of a GGUF file's tensor that are read at once."""
GPTQ_SETTINGS = ("bits", "group_size", "sym", "desc_act")
"""Settings of a GPTQ checkpoint that are shown."""


@dataclass(frozen=True)
class Module:
    """A tensor, or a layer that is stored as several tensors, under the name of its module."""

    name: str
    shape: tuple[int, ...]
    precision: str
    weights: int
    zeros: int | None
    """None when they are packed in a way that is not read here."""
    linear: bool
    """Whether it is a linear layer of a decoder block; without a config.json, whether its name and shape look so."""


@dataclass(frozen=True)
class Total:
    """Sums over the modules whose zeros can be counted."""

    modules: int
    weights: int
    zeros: int

    @property
    def sparsity(self) -> float | None:
        return self.zeros / self.weights if self.weights else None


@dataclass(frozen=True)
class Inspection:
    """A model's modules in the order of their names, and its settings."""

    path: Path
    format: str
    details: dict[str, Any]
    size: int
    """Bytes on disk of all files in the folder."""
    modules: tuple[Module, ...]

    @property
    def linears(self) -> Total:
        """Sums over the linear layers of decoder blocks."""
        return _total(module for module in self.modules if module.linear)

    @property
    def all(self) -> Total:
        """Sums over everything: embeddings, norms and the head too."""
        return _total(self.modules)

    @property
    def precision(self) -> dict[str, int]:
        """Number of weights in each precision, largest first."""
        counts: dict[str, int] = {}
        for module in self.modules:
            counts[module.precision] = counts.get(module.precision, 0) + module.weights
        return dict(sorted(counts.items(), key=lambda item: -item[1]))

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain data."""
        totals = {"linears": self.linears, "all": self.all}
        return {
            "path": str(self.path),
            "format": self.format,
            "details": self.details,
            "size": self.size,
            "precision": self.precision,
            "totals": {name: asdict(total) | {"sparsity": total.sparsity} for name, total in totals.items()},
            "modules": [asdict(module) for module in self.modules],
        }

    def lines(self) -> list[str]:
        """Return everything but the table as lines of text."""
        details = ", ".join(f"{key} {value}" for key, value in self.details.items())
        weights = ", ".join(f"{count:,} {precision}" for precision, count in self.precision.items())
        lines = [
            f"format: {self.format}" + (f" ({details})" if details else ""),
            f"size on disk: {human_size(self.size)}",
        ]
        lines.append(f"precision: {weights}")
        if self.format in PACKED:
            lines.append('a recipe reads these weights as floats with "dequantize": true in its model')
        if unread := sum(module.zeros is None for module in self.modules):
            lines.append(f"not counted: {unread} tensors, whose packed values are not read here")
        return lines

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Return heads and rows: matrices one by one, then the totals. Norms and biases are only in the totals."""
        heads = ["module", "shape", "precision", "weights", "zeros", "sparsity"]
        cells = []
        for module in self.modules:
            if len(module.shape) > 1:
                share = module.zeros / module.weights if module.zeros is not None and module.weights else None
                shape = "×".join(map(str, module.shape))
                cells.append([module.name, shape, module.precision, *_counts(module.weights, module.zeros, share)])
        for name, total in (("linear layers in decoder blocks", self.linears), ("all", self.all)):
            if not total.modules:  # an adapter has none
                continue
            counts = _counts(total.weights, total.zeros, total.sparsity)
            cells.append([f"total, {name}", f"{total.modules} modules", "", *counts])
        return heads, cells


def inspect_model(path: Path, track: Track = silent) -> Inspection:
    """Read every tensor of a model or adapter folder, of an artifact that holds one, or of a GGUF file.

    Raises:
        ModelError: when there is none; the message says what there is instead.
        ArtifactError: when a file of it is damaged; the message names it.
    """
    if not path.exists():
        raise ModelError(f"there is no folder {path}; name one that holds a model, or a GGUF file")
    try:
        if path.is_file():
            if path.suffix != ".gguf":
                raise ModelError(f"{path} is neither a folder nor a GGUF file; name the folder that holds the model")
            return _gguf(path, track)
        if (path / MANIFEST).is_file():  # an artifact of a store
            path = next(filter(Path.is_dir, (path / "model", path / "adapter")), path)
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1 and not any(path.glob("*.safetensors")):
            return _gguf(ggufs[0], track)
        return _folder(path, track)
    except OSError as error:
        raise unreadable(error, path) from None


def _folder(path: Path, track: Track) -> Inspection:
    shapes = {name: shape for file in _files(path) for name, shape in safetensors_header(file).items()}
    names, tensors = sorted(shapes), set(shapes)
    reader = FolderReader(path)
    form, details, modules, total = _floats(reader, names)
    if (path / "adapter_config.json").is_file():
        form, details = "PEFT adapter", _peft(read_object(path / "adapter_config.json"))
    elif (path / "sqft_adapter.json").is_file():
        form, details = "sqft adapter", _sqft(read_object(path / "sqft_adapter.json"))
    elif not (path / "config.json").is_file():
        form = "safetensors without config.json"
    elif (packed := packed_floats(read_object(path / "config.json"))) is not None:
        tensors = set(floats := packed.float_shapes(path, shapes))
        form, details, modules, total = _packed(reader, packed.method, floats, packed.parts(shapes))
    elif (stored := read_object(path / "config.json").get("quantization_config")) is not None:
        settings = stored if isinstance(stored, dict) else {}
        method, version = settings.get("quant_method"), settings.get("checkpoint_format") or "gptq"
        if method == "gptq" and version == "gptq":
            form, details, modules, total = _gptq(reader, names, gptq_settings(path, {"quantization_config": stored}))
        elif method == "compressed-tensors":
            form, details, modules, total = _compressed(reader, names, settings)
        else:
            form = f"quantized ({method or 'in some way'}{f', {version}' if method == 'gptq' else ''})"
            details = {key: settings[key] for key in ("bits", "group_size") if key in settings}
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    read = tuple(track(modules, f"reading {path.name}", total))
    linear = _linear_layers(path, [one.name for one in read], tensors)
    if linear is not None:
        read = tuple(replace(one, linear=one.name in linear) for one in read)
    return Inspection(path, form, details, size, tuple(sorted(read, key=lambda module: in_order(module.name))))


def _linear_layers(path: Path, modules: Sequence[str], tensors: AbstractSet[str]) -> set[str] | None:
    """Return those of a folder's modules that hold weights of linear layers in decoder blocks, of a mixture's experts
    too; None where transformers has no model for the folder.

    Args:
        path: the folder.
        modules: their names: a tensor's, or what comes before its last part.
        tensors: the names of the folder's tensors.
    """
    try:
        model = load_skeleton(ModelSpec(path))
    except ModelError:
        return None
    stored = {name: name if name in tensors else f"{name}.weight" for name in modules}
    layers, names = linears(model), CheckpointNames(model, stored.values())
    mixtures = {name for name, module in model.named_modules() if isinstance(module, Experts)}

    def is_linear(name: str) -> bool:
        owner, _, part = names.module_tensor(stored[name]).rpartition(".")
        return names.layer(name) in layers or (owner in mixtures and not part.endswith("_bias"))

    return set(filter(is_linear, modules))


def _files(path: Path) -> list[Path]:
    """Return the files with the weights: those that transformers would read, or all when it would read none."""
    files = sorted(path.glob("*.safetensors"))
    if not files or (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        return sorted(weight_files(path))  # raises an error that says what is wrong
    return files


Content = tuple[str, dict[str, Any], Iterator[Module], int]
"""A format's name, its settings, its modules as they are read, and their number."""


def _floats(reader: FolderReader, names: Sequence[str]) -> Content:
    return "Hugging Face floats", {}, (_float(name, reader, name) for name in names), len(names)


def _float(name: str, reader: FolderReader, stored: str) -> Module:
    """Return a tensor, counted a piece after the other.

    Args:
        name: the module's.
        reader: of the folder.
        stored: the tensor's name there.
    """
    pieces = reader.pieces(stored)
    first = next(pieces)
    zeros: int | None = None
    if first.is_floating_point():
        zeros = sum(piece.numel() - _count_nonzero(piece) for piece in chain([first], pieces))
    return _module(name, reader.shape(stored), str(first.dtype).removeprefix("torch."), zeros)


def _count_nonzero(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor.float() if tensor.dtype.itemsize == 1 else tensor))  # not of 8 bits


def _module(tensor: str, shape: tuple[int, ...], precision: str, zeros: int | None) -> Module:
    weights = 1
    for size in shape:
        weights *= size
    linear = len(shape) == 2 and IN_A_BLOCK.search(tensor) is not None
    return Module(tensor.removesuffix(".weight"), shape, precision, weights, zeros, linear)


def _layer(name: str, layer: Quantized) -> Module:
    """Return a layer on a grid: a weight is zero where its code equals the zero point of its group."""
    grid, (out, inputs) = layer.grid, layer.codes.shape
    zero = grid.zero.to(layer.codes.dtype)[:, group_index(grid, inputs)]
    zeros = int((layer.codes == zero).sum())
    return _module(f"{name}.weight", (out, inputs), _on_grid(grid.bits, grid.group_size), zeros)


def _on_grid(bits: int, group_size: int) -> str:
    return f"int{bits} " + ("by rows" if group_size == -1 else f"in groups of {group_size}")


def _gptq(reader: FolderReader, names: Sequence[str], settings: dict[str, Any] | None) -> Content:
    assert settings is not None
    layers, floats = _split(names, "qweight", GPTQ_PARTS)

    def modules() -> Iterator[Module]:
        yield from (_layer(name, read_layer(reader, name, settings)) for name in layers)
        yield from (_float(name, reader, name) for name in floats)

    known: dict[str, Any] = {key: settings[key] for key in settings if key in GPTQ_SETTINGS}
    return "GPTQ, version 1", known, modules(), len(layers) + len(floats)


def _compressed(reader: FolderReader, names: Sequence[str], settings: dict[str, Any]) -> Content:
    layers, floats = _split(names, "weight_packed", COMPRESSED_PARTS)

    def modules() -> Iterator[Module]:
        for name in layers:
            try:
                layer = read_compressed_layer(reader, name)
            except (RuntimeError, ValueError, IndexError) as error:
                raise ArtifactError(f"{reader.folder}: the parts of {name} do not fit together: {error}") from None
            yield _layer(name, layer)
        yield from (_float(name, reader, name) for name in floats)

    form = settings.get("format", "")
    return f"compressed-tensors {form}".strip(), {}, modules(), len(layers) + len(floats)


def _packed(
    reader: FolderReader, method: str, floats: Mapping[str, tuple[int, ...]], parts: Mapping[str, Sequence[str]]
) -> Content:
    """Return what a folder of FP8 or MXFP4 holds: the floats that its tensors stand for, without their scales. A weight
    is zero where its code is; the codes of MXFP4 are not counted."""

    def modules() -> Iterator[Module]:
        for name in sorted(floats):
            if method == "mxfp4" and len(parts[name]) > 1:
                yield _module(name, floats[name], method, None)
            else:
                yield _float(name, reader, parts[name][0])

    return method.upper(), {}, modules(), len(floats)


def _split(names: Sequence[str], codes: str, parts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the layers that are stored as these parts, one of which holds codes; and all other tensors."""
    layers = [name.removesuffix(f".{codes}") for name in names if name.endswith(f".{codes}")]
    parts_of_layers = {f"{layer}.{part}" for layer in layers for part in parts}
    return layers, [name for name in names if name not in parts_of_layers]


def _gguf(path: Path, track: Track) -> Inspection:
    reader = open_gguf(path)
    if not reader.tensors:
        raise ModelError(f"{path} holds no tensors, only a vocabulary or settings; name the model's own file")
    read = tuple(track(map(_gguf_module, reader.tensors), f"reading {path.name}", len(reader.tensors)))
    return Inspection(path, "GGUF", {}, path.stat().st_size, tuple(sorted(read, key=lambda m: in_order(m.name))))


def _gguf_module(tensor: Any) -> Module:
    from gguf.quants import dequantize

    name, shape = str(tensor.name), tuple(int(n) for n in reversed(tensor.shape))
    step = max(1, GGUF_PIECE // max(1, math.prod(shape[1:])))
    pieces = (tensor.data[start : start + step] for start in range(0, len(tensor.data), step))
    try:
        zeros = sum(int((dequantize(piece, tensor.tensor_type) == 0).sum()) for piece in pieces)
    except (NotImplementedError, TypeError):
        zeros = None
    match = GGUF_BLOCK.fullmatch(name)
    linear = bool(match and match[2] in GGUF_LINEARS)
    return replace(_module(name, shape, str(tensor.tensor_type.name), zeros), linear=linear)


def _peft(config: dict[str, Any]) -> dict[str, Any]:
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return {"base": config.get("base_model_name_or_path"), "ranks": _span(ranks), "alpha": config.get("lora_alpha")}


def _sqft(config: dict[str, Any]) -> dict[str, Any]:
    ranks = list((config.get("ranks") or {}).values())
    return {"base": config.get("base_model"), "merger": config.get("merger"), "ranks": _span(ranks)}


def _span(ranks: Sequence[Any]) -> str:
    known = sorted({rank for rank in ranks if isinstance(rank, int)})
    return f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0]) if known else "unknown"


def _total(modules: Iterable[Module]) -> Total:
    counted = [module for module in modules if module.zeros is not None]
    return Total(len(counted), sum(m.weights for m in counted), sum(m.zeros or 0 for m in counted))


def in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts module names with their numbers as numbers: layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _counts(weights: int, zeros: int | None, share: float | None) -> list[str]:
    if zeros is None:
        return [f"{weights:,}", "–", "–"]
    return [f"{weights:,}", f"{zeros:,}", f"{share:.2%}" if share is not None else "–"]
