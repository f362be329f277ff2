"""Write a finished model as one GGUF file, a tensor at a time, and read it back."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoConfig

from sqft.api import ModelReader, StageError
from sqft.kernels.grids import dequantize
from sqft_gguf.families import (
    FAMILIES,
    add_settings,
    heads_of,
    interleave,
    refusal_of_config,
    rope_factors,
)
from sqft_gguf.grids import BLOCK, blocks, type_of
from sqft_gguf.vocabulary import add_tokenizer

FILE = "model.gguf"
TYPES = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}
PRECISIONS = {"float32": Type.F32, "float16": Type.F16, "bfloat16": Type.BF16, "q8_0": Type.Q8_0}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its name there and in the model, its shape and type, whether it is of codes, the heads
    whose rows are put in another order (0: none), and what is added to its values."""

    name: str
    source: str
    shape: tuple[int, ...]
    kind: Type
    coded: bool
    heads: int
    offset: float

    @property
    def layer(self) -> str:
        """The module that it is of."""
        return self.source.rpartition(".")[0]


def write(model: ModelReader, folder: Path, dtype: str, embeddings: str) -> None:
    """Write `model` into `folder`; matrices of floats get the precision `dtype`, those at both ends `embeddings`.

    Raises:
        StageError: when GGUF has no place for the model, for its codes, or for its tokenizer, or when what was written
            is not the model.
    """
    config = json.loads((model.folder / "config.json").read_text("utf-8"))
    if why := refusal_of_config(config):
        raise StageError(f"export (gguf): {why}")
    with_defaults = AutoConfig.from_pretrained(model.folder).to_dict()
    if why := refusal_of_config(with_defaults):
        raise StageError(f"export (gguf): {why}")
    family = FAMILIES[config["model_type"]]
    entries = list(_entries(model, with_defaults, dtype, embeddings))
    writer = GGUFWriter(folder / FILE, gguf.MODEL_ARCH_NAMES[family.architecture])
    try:
        name = Path(config.get("_name_or_path") or model.folder).name
        writer.add_name(name if family.named in name.lower() else f"{name} ({family.named})")
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(entries))
        rows = next(entry.shape[0] for entry in entries if entry.source == EMBEDDING)
        add_settings(writer, {**with_defaults, "vocab_size": rows})
        add_tokenizer(writer, model.folder, rows, config["model_type"])
        factors = rope_factors(with_defaults)
        for name, values in factors.items():
            writer.add_tensor_info(name, values.shape, values.dtype, values.nbytes)
        for entry in entries:
            shape, size = gguf.quant_shape_to_byte_shape(entry.shape, entry.kind), _bytes(entry)
            writer.add_tensor_info(entry.name, shape, np.dtype(np.uint8), size, entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for values in factors.values():
            writer.write_tensor_data(values)
        for entry in entries:
            writer.write_tensor_data(_data(model, entry))
    finally:
        writer.close()
    check(model, folder / FILE, entries)


def check(model: ModelReader, file: Path, entries: list[Entry]) -> None:
    """Read a file back with gguf's own reader, and compare all values with the model's, bit for bit where they are not
    rounded.

    Raises:
        StageError: naming a tensor that is not the model's.
    """
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for entry in entries:
        found = gguf.quants.dequantize(stored[entry.name].data, entry.kind).reshape(entry.shape)
        expected = _floats(model, entry)
        if entry.kind == Type.Q8_0 and not entry.coded:
            expected = gguf.quants.dequantize(gguf.quants.quantize(expected, Type.Q8_0), Type.Q8_0)
        elif entry.kind in (Type.F16, Type.BF16):
            to = torch.float16 if entry.kind == Type.F16 else torch.bfloat16
            expected = torch.from_numpy(expected).to(to).float().numpy()
        if not np.array_equal(found, expected):
            raise StageError(f"export (gguf): {entry.name} as stored has not the values of {entry.source}")


def _entries(model: ModelReader, config: Mapping[str, Any], dtype: str, embeddings: str) -> Iterator[Entry]:
    family = FAMILIES[config["model_type"]]
    names = gguf.get_tensor_name_map(family.architecture, config["num_hidden_layers"])
    heads, key_heads, _ = heads_of(config)
    turned = {"q_proj": heads, "k_proj": key_heads} if family.interleaved else {}
    quantized, sources = set(model.quantized()), list(model.names())
    tied = HEAD in sources and "lm_head" not in quantized and config.get("tie_word_embeddings")
    if tied and model.tensor(HEAD).equal(model.tensor(EMBEDDING)):  # llama.cpp takes the embedding
        sources.remove(HEAD)
    for source in sources:
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise StageError(f"export (gguf): {family.architecture.name} has no name for {source} in GGUF")
        layer = source.rpartition(".")[0]
        coded = source.endswith(".weight") and layer in quantized
        if coded:
            codes = model.codes(layer)
            try:
                kind = type_of(codes.grid, codes.codes.shape[1])
            except ValueError as error:
                raise StageError(f"export (gguf): {source}: {error}") from None
            shape = tuple(codes.codes.shape)
        else:
            tensor = model.tensor(source)
            shape = tuple(tensor.shape)
            kind = _precision(source, tensor, dtype, embeddings)
        offset = family.norm_offset if layer.endswith("norm") else 0.0
        yield Entry(name, source, shape, kind, coded, turned.get(layer.rpartition(".")[2], 0), offset)


def _precision(source: str, tensor: Tensor, dtype: str, embeddings: str) -> Type:
    """Return the type of a tensor of floats: float32 for vectors, as llama.cpp wants them."""
    if tensor.dim() == 1:
        return Type.F32
    wanted = embeddings if source in (EMBEDDING, HEAD) else dtype
    if wanted == "q8_0" and tensor.shape[-1] % BLOCK:
        raise StageError(f"export (gguf): {source} has rows of {tensor.shape[-1]}, and q8_0 wants multiples of {BLOCK}")
    return PRECISIONS.get(wanted, TYPES.get(tensor.dtype, Type.F32))


def _bytes(entry: Entry) -> int:
    return int(np.prod(gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)))


def _data(model: ModelReader, entry: Entry) -> NDArray[Any]:
    """Return a tensor's bytes."""
    if entry.coded:
        packed = blocks(model.codes(entry.layer))
        return interleave(packed, entry.heads) if entry.heads else packed
    floats = _floats(model, entry)
    if entry.kind == Type.F16:
        rounded = torch.from_numpy(floats).half()
        if not bool(rounded.isfinite().all()):
            raise StageError(f"export (gguf): {entry.source} does not fit into float16; take bfloat16")
    return np.ascontiguousarray(gguf.quants.quantize(floats, entry.kind)).view(np.uint8)


def _floats(model: ModelReader, entry: Entry) -> NDArray[np.float32]:
    """Return a tensor's values as llama.cpp wants them, float32: with their offset, and rows in its order."""
    tensor = dequantize(model.codes(entry.layer)) if entry.coded else model.tensor(entry.source).float() + entry.offset
    values: NDArray[np.float32] = tensor.numpy()
    return np.ascontiguousarray(interleave(values, entry.heads)) if entry.heads else values


def _file_type(entries: list[Entry]) -> int:
    """Return the number that names what most weights of the file are."""
    kinds = [entry.kind for entry in entries if len(entry.shape) > 1]
    most = max(set(kinds), key=lambda kind: sum(int(np.prod(e.shape)) for e in entries if e.kind == kind))
    named = {Type.F32: "ALL_F32", Type.F16: "MOSTLY_F16", Type.BF16: "MOSTLY_BF16"}
    return int(gguf.LlamaFileType[named.get(most, f"MOSTLY_{most.name}")])
