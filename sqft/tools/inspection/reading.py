"""Inspect a model's folder: sparsity, precision, format and size, a piece of a tensor in memory at a time."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.checkpoints.gguf import GGUF_BLOCK, GGUF_LINEARS, open_gguf
from sqft.checkpoints.gptq import GPTQ_PARTS, gptq_settings
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.packed_floats import PackedFloats, packed_floats
from sqft.checkpoints.safetensors import INDEX, WEIGHTS, read_object, tensor_entries, weight_files
from sqft.errors import ArtifactError, ModelError
from sqft.kernels.grids import group_index
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.experts import Experts
from sqft.modeling.architecture.linears import stored_transposed
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.loading import load_skeleton
from sqft.modeling.loading.compressed import read_compressed_layer
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import read_layer
from sqft.tools.inspection.patterns import GROUPS, GroupCounts
from sqft.tools.inspection.result import Inspection, Module
from sqft.types import Quantized
from sqft.utils.files import MANIFEST, unreadable
from sqft.utils.progress import Track, silent

IN_A_BLOCK = re.compile(r"\.\d+\.(.*\.)?(?!embed|wte|wpe|lora_)\w+\.weight$")
"""A weight in a numbered block that is neither an embedding table (DeepSeek's last block has one) nor an adapter's."""
COMPRESSED_PARTS = ("weight_packed", "weight_shape", "weight_scale", "weight_zero_point", "weight_g_idx")
"""The tensors that compressed-tensors' "pack-quantized" stores instead of a layer's weight."""
GGUF_PIECE = 1 << 24
"""Weights of a GGUF file's tensor that are read at once."""
GPTQ_SETTINGS = ("bits", "group_size", "sym", "desc_act")
"""Settings of a GPTQ checkpoint that are shown."""


Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Stored:
    """A tensor, or a layer that is stored as several, as it is read."""

    shape: tuple[int, ...]
    precision: str
    kept: Iterator[Tensor] | None
    """bool, true where a weight is not zero: a piece of the rows after the other. None where that is not read here."""
    coded: bool = False
    """Whether it is codes: [out, in], also of a model that stores its weights as [in, out]."""


@dataclass(frozen=True)
class Weight:
    """A weight of a folder, and how it is read."""

    tensor: str
    """Its tensor's name in floats."""
    parts: Sequence[str]
    """The tensors in which it is stored."""
    read: Callable[[], Stored]


Content = tuple[str, dict[str, Any], list[Weight]]
"""A format's name, its settings, and the weights."""


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
    files = _files(path)
    entries = {name: entry for file in files for name, entry in tensor_entries(file).items()}
    shapes = {name: tuple(entry["shape"]) for name, entry in entries.items()}
    form, details, weights = _content(path, shapes)
    linear = _linear_tensors(path, [weight.tensor for weight in weights], shapes)
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in entries.items()}
    modules = []
    for weight in track(weights, f"reading {path.name}", len(weights)):
        stored = weight.read()
        guessed = False if _looks_linear(weight.tensor, stored.shape) else None
        transposed = guessed if linear is None else linear.get(weight.tensor)
        modules.append(_module(weight.tensor, stored, sum(sizes[part] for part in weight.parts), transposed))
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    return Inspection(path, form, details, size, _sorted(modules))


def _content(path: Path, shapes: Shapes) -> Content:
    """Return what a folder with tensors of these names and shapes holds."""
    reader = FolderReader(path)
    floats = [_float(reader, name) for name in sorted(shapes)]
    if (path / "adapter_config.json").is_file():
        return "PEFT adapter", _peft(read_object(path / "adapter_config.json")), floats
    if (path / "sqft_adapter.json").is_file():
        return "sqft adapter", _sqft(read_object(path / "sqft_adapter.json")), floats
    if not (path / "config.json").is_file():
        return "safetensors without config.json", {}, floats
    config = read_object(path / "config.json")
    if (packed := packed_floats(config)) is not None:
        return _packed(reader, packed, packed.float_shapes(path, shapes), packed.parts(shapes))
    if (stated := config.get("quantization_config")) is None:
        return "Hugging Face floats", {}, floats
    settings = stated if isinstance(stated, dict) else {}
    method, version = settings.get("quant_method"), settings.get("checkpoint_format") or "gptq"
    if method == "gptq" and version == "gptq":
        return _gptq(reader, sorted(shapes), gptq_settings(path, {"quantization_config": stated}))
    if method == "compressed-tensors":
        return _compressed(reader, sorted(shapes), settings)
    form = f"quantized ({method or 'in some way'}{f', {version}' if method == 'gptq' else ''})"
    return form, {key: settings[key] for key in ("bits", "group_size") if key in settings}, floats


def _linear_tensors(path: Path, tensors: Sequence[str], shapes: Shapes) -> dict[str, bool] | None:
    """Return those of a folder's weights that are of linear layers in decoder blocks, of a mixture's experts too, and
    whether transformers stores each as [in, out]; None where transformers has no model for the folder.

    Args:
        path: the folder.
        tensors: the names of the weights' tensors in floats.
        shapes: of the tensors that are stored.
    """
    try:
        model = load_skeleton(ModelSpec(path))
    except ModelError:
        return None
    layers, names = linears(model), CheckpointNames(model, tensors)
    mixtures = {name: module.form for name, module in model.named_modules() if isinstance(module, Experts)}
    found: dict[str, bool] = {}
    for tensor in tensors:
        layer = names.layer(tensor.removesuffix(".weight"))
        owner, _, part = names.module_tensor(tensor).rpartition(".")
        if layer in layers:
            found[tensor] = stored_transposed(layers[layer])
        elif owner in mixtures and not part.endswith("_bias"):
            found[tensor] = mixtures[owner].transposed
    return found


def _files(path: Path) -> list[Path]:
    """Return the files with the weights: those that transformers would read, or all when it would read none."""
    files = sorted(path.glob("*.safetensors"))
    if not files or (path / WEIGHTS).is_file() or (path / INDEX).is_file():
        return sorted(weight_files(path))  # raises an error that says what is wrong
    return files


def _module(tensor: str, stored: Stored, size: int, transposed: bool | None) -> Module:
    """Read a weight once, and count its zeros and groups.

    Args:
        tensor: the name of its tensor in floats.
        stored: the weight.
        size: its bytes on disk.
        transposed: whether a linear layer's weight is [in, out]; None for what is no linear layer.
    """
    weights = math.prod(stored.shape)
    zeros, pattern = None, None
    if stored.kept is not None:
        turned = bool(transposed) and not stored.coded
        groups = GroupCounts(stored.shape[-2 if turned else -1]) if transposed is not None else None
        zeros = weights
        for kept in _whole_groups(stored.kept) if turned and len(stored.shape) == 2 else stored.kept:
            zeros -= int(kept.count_nonzero())
            if groups is not None:
                groups.add(kept.mT if turned else kept)
        pattern = groups.pattern if groups is not None else None
    name = tensor.removesuffix(".weight")
    return Module(name, stored.shape, stored.precision, weights, zeros, size, transposed is not None, pattern)


def _whole_groups(pieces: Iterable[Tensor]) -> Iterator[Tensor]:
    """Cut pieces of rows anew, so that each but the last holds whole groups of rows."""
    rest: Tensor | None = None
    for piece in pieces:
        rows = piece if rest is None else torch.cat([rest, piece])
        whole = len(rows) - len(rows) % max(GROUPS)
        yield rows[:whole]
        rest = rows[whole:]
    if rest is not None:
        yield rest


def _float(reader: FolderReader, name: str, stored: str = "") -> Weight:
    """Return a weight of floats in one tensor, which is read a piece after the other; `stored` is its name if it is
    another one."""
    stored = stored or name
    return Weight(name, [stored], partial(_read_float, reader, stored))


def _read_float(reader: FolderReader, name: str) -> Stored:
    pieces = reader.pieces(name)
    first = next(pieces)
    kept = map(_is_kept, chain([first], pieces)) if first.is_floating_point() else None
    return Stored(reader.shape(name), str(first.dtype).removeprefix("torch."), kept)


def _is_kept(piece: Tensor) -> Tensor:
    return (piece.float() if piece.dtype.itemsize == 1 else piece) != 0  # not of 8 bits


def _layer(name: str, parts: Sequence[str], read: Callable[[], Quantized]) -> Weight:
    return Weight(f"{name}.weight", parts, lambda: _read_layer(read()))


def _read_layer(layer: Quantized) -> Stored:
    """Return a layer on a grid: a weight is zero where its code equals the zero point of its group."""
    grid, (out, inputs) = layer.grid, layer.codes.shape
    zero = grid.zero.to(layer.codes.dtype)[:, group_index(grid, inputs)]
    precision = f"int{grid.bits} " + ("by rows" if grid.group_size == -1 else f"in groups of {grid.group_size}")
    return Stored((out, inputs), precision, iter([layer.codes != zero]), coded=True)


def _gptq(reader: FolderReader, names: Sequence[str], settings: dict[str, Any] | None) -> Content:
    assert settings is not None
    layers, floats = _split(names, "qweight", GPTQ_PARTS)
    weights = [_layer(name, parts, partial(read_layer, reader, name, settings)) for name, parts in layers.items()]
    known: dict[str, Any] = {key: settings[key] for key in settings if key in GPTQ_SETTINGS}
    return "GPTQ, version 1", known, weights + [_float(reader, name) for name in floats]


def _compressed(reader: FolderReader, names: Sequence[str], settings: dict[str, Any]) -> Content:
    layers, floats = _split(names, "weight_packed", COMPRESSED_PARTS)
    weights = [_layer(name, parts, partial(_read_compressed, reader, name)) for name, parts in layers.items()]
    form = f"compressed-tensors {settings.get('format', '')}".strip()
    return form, {}, weights + [_float(reader, name) for name in floats]


def _read_compressed(reader: FolderReader, name: str) -> Quantized:
    try:
        return read_compressed_layer(reader, name)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{reader.folder}: the parts of {name} do not fit together: {error}") from None


def _packed(reader: FolderReader, packed: PackedFloats, floats: Shapes, parts: Mapping[str, Sequence[str]]) -> Content:
    """Return what a folder of FP8 or MXFP4 holds: the floats that its tensors stand for, without their scales. A weight
    is zero where its code is; the codes of MXFP4 are not counted."""
    weights = []
    for name in sorted(floats):
        read = partial(_read_float, reader, parts[name][0])
        if packed.method == "mxfp4" and len(parts[name]) > 1:
            read = partial(Stored, floats[name], packed.method, None)
        weights.append(Weight(name, parts[name], read))
    return packed.method.upper(), {}, weights


def _split(names: Sequence[str], codes: str, parts: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Return the layers that are stored as these parts, one of which holds codes, each with those of its tensors; and
    all other tensors."""
    known = set(names)
    layers = {
        layer: [f"{layer}.{part}" for part in parts if f"{layer}.{part}" in known]
        for layer in (name.removesuffix(f".{codes}") for name in names if name.endswith(f".{codes}"))
    }
    parts_of_layers = {part for tensors in layers.values() for part in tensors}
    return layers, [name for name in names if name not in parts_of_layers]


def _gguf(path: Path, track: Track) -> Inspection:
    reader = open_gguf(path)
    if not reader.tensors:
        raise ModelError(f"{path} holds no tensors, only a vocabulary or settings; name the model's own file")
    modules = []
    for tensor in track(reader.tensors, f"reading {path.name}", len(reader.tensors)):
        name = str(tensor.name)
        match = GGUF_BLOCK.fullmatch(name)
        transposed = False if match and match[2] in GGUF_LINEARS else None
        modules.append(_module(name, _read_gguf(tensor), int(tensor.n_bytes), transposed))
    return Inspection(path, "GGUF", {}, path.stat().st_size, _sorted(modules))


def _read_gguf(tensor: Any) -> Stored:
    from gguf.quants import dequantize

    shape, precision = tuple(int(n) for n in reversed(tensor.shape)), str(tensor.tensor_type.name)
    step = max(1, GGUF_PIECE // max(1, math.prod(shape[1:])))
    pieces = (tensor.data[start : start + step] for start in range(0, len(tensor.data), step))
    kept = (torch.from_numpy(dequantize(piece, tensor.tensor_type) != 0) for piece in pieces)
    try:
        first = list(islice(kept, 1))
    except (NotImplementedError, TypeError):
        return Stored(shape, precision, None)
    return Stored(shape, precision, chain(first, kept))


def _looks_linear(tensor: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and IN_A_BLOCK.search(tensor) is not None


def _sorted(modules: Iterable[Module]) -> tuple[Module, ...]:
    return tuple(sorted(modules, key=lambda module: in_order(module.name)))


def _peft(config: dict[str, Any]) -> dict[str, Any]:
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    return {"base": config.get("base_model_name_or_path"), "ranks": _span(ranks), "alpha": config.get("lora_alpha")}


def _sqft(config: dict[str, Any]) -> dict[str, Any]:
    ranks = list((config.get("ranks") or {}).values())
    return {"base": config.get("base_model"), "merger": config.get("merger"), "ranks": _span(ranks)}


def _span(ranks: Sequence[Any]) -> str:
    known = sorted({rank for rank in ranks if isinstance(rank, int)})
    return f"{known[0]} to {known[-1]}" if len(known) > 1 else str(known[0]) if known else "unknown"


def in_order(name: str) -> list[tuple[int, str]]:
    """Return a key that sorts module names with their numbers as numbers: layer 10 after layer 9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]
