"""Write a finished model as a folder for mlx_lm, and read it back."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from sqft.api import ModelReader, Quantized, StageError, parameters, write_config, write_shards
from sqft.kernels.grids import dequantize
from sqft.kernels.packing import pack, unpack
from sqft_mlx.settings import SIZES, refusal_of_config, refusal_of_grid, written

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def write(model: ModelReader, folder: Path, dtype: str, limit: int | str) -> None:
    """Write `model` into `folder`, floats in the precision `dtype`, in files of at most `limit` bytes.

    Raises:
        StageError: when mlx_lm would compute another model, when MLX has no place for its codes, or when what was
            written is not the model.
    """
    config = AutoConfig.from_pretrained(model.folder).to_dict()
    if why := refusal_of_config(config):
        raise StageError(f"export (mlx): {why}")
    size, bits = _group(model)
    # mlx_lm does not read the head of a model whose head is its embedding.
    own_head = HEAD in model.floats() and not model.tensor(HEAD).equal(model.tensor(EMBEDDING))
    model.copy_settings(folder)
    own_settings = {name: config[name] for name in config.keys() - PretrainedConfig().to_dict().keys()}
    settings = written({**own_settings, "tie_word_embeddings": not own_head})
    if size:
        grid = {"group_size": size, "bits": bits, "mode": "affine"}
        settings |= {"quantization": grid, "quantization_config": grid}
    if dtype != "as-is":
        settings |= {"dtype": dtype, "torch_dtype": dtype}
    write_config(folder, **settings)
    floats = {name for name in model.floats() if name != HEAD or own_head}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in parameters(model, partial(affine, size=size)):
            if name in floats:
                yield name, tensor if dtype == "as-is" else tensor.to(getattr(torch, dtype))
            elif name != HEAD:
                yield name, tensor

    write_shards(tensors(), folder, limit)
    _check(model, folder)


def _group(model: ModelReader) -> tuple[int, int]:
    """Return the inputs of a group in MLX, the same in all layers, and the bits of a code; 0 and 0 without codes.

    Raises:
        StageError: when no size of a group fits, or groups are not in order.
    """
    lengths, bits = set[int](), 0
    for name in model.quantized():
        layer = model.codes(name)
        grid, inputs, bits = layer.grid, layer.codes.shape[1], layer.grid.bits
        length = inputs if grid.group_size == -1 else grid.group_size
        ordered = grid.group_index is None or length == inputs
        if why := refusal_of_grid({"group_size": length, "act_order": not ordered}):
            raise StageError(f"export (mlx): {name}: {why}")
        lengths.add(length)
    return next(size for size in SIZES if not any(length % size for length in lengths)) if lengths else 0, bits


def affine(layer: Quantized, size: int) -> dict[str, Tensor]:
    """Return a layer's tensors in MLX's form, for groups of `size` inputs.

    `weight` uint32 [out, in · bits / 32], along a row one stream of bits, lowest first; `scales` and `biases`
    [out, in / size]. A longer group's are repeated. Neither product nor sum rounds in float32: a scale has 11
    significant bits, and codes have 8.
    """
    grid, inputs = layer.grid, layer.codes.shape[1]
    repeated = (inputs if grid.group_size == -1 else grid.group_size) // size
    scale, zero = (part.float().repeat_interleave(repeated, 1) for part in (grid.scale, grid.zero))
    bias = -scale * zero
    if bias.half().float().equal(bias):
        scale, bias = scale.half(), bias.half()
    words = pack(layer.codes.T, grid.bits).T.contiguous().view(torch.uint32)
    return {"weight": words, "scales": scale, "biases": bias}


def _check(model: ModelReader, folder: Path) -> None:
    """Read the codes back by MLX's definition, and compare all values with the model's, bit for bit."""
    files: dict[str, Path] = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            files |= dict.fromkeys(stored.keys(), file)

    def read(name: str) -> Tensor:
        with safe_open(files[name], "pt") as stored:
            tensor: Tensor = stored.get_tensor(name)
        return tensor

    for name in model.quantized():
        layer = model.codes(name)
        words = read(f"{name}.weight").view(torch.int32)
        codes = unpack(words.T.contiguous(), layer.grid.bits).T.double()  # [out, in]
        scale, bias = (read(f"{name}.{part}").double()[..., None] for part in ("scales", "biases"))
        value = scale * codes.reshape(*scale.shape[:2], -1) + bias  # [out, groups, inputs of a group]
        if not value.reshape(codes.shape).equal(dequantize(layer).double()):
            raise StageError(f"export (mlx): what was written of {name} is not the model's; report this")
