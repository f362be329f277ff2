"""Quantized models as folders: GPTQ checkpoints, version 1, written and read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sqft.checkpoints.gptq import GPTQ_PARTS, gptq_config, gptq_settings, write_gptq_config
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize
from sqft.kernels.packing import from_gptq, to_gptq
from sqft.modeling.adapters.frozen_weight import PackedLinear, PackedWeight
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears, as_stored, from_stored
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.transformers_io import quiet_transformers, save_settings, stock_class
from sqft.types import Grid, Quantized


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model folder; None when its weights are floats.

    Raises:
        ModelError: when it is another format than GPTQ's, version 1.
    """
    return gptq_settings(folder, json.loads((folder / "config.json").read_text("utf-8")))


def save_quantized(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layers: Mapping[str, Quantized], folder: Path
) -> None:
    """Write a GPTQ folder: the layers' codes and grids, everything else as the model has it.

    `lm_head.weight` is stored even where it is tied: a consumer that does not tie it would otherwise load zeros
    without a word.
    """
    tensors: dict[str, Tensor] = {
        name: tensor
        for name, tensor in as_stored(model, codes=layers).items()
        if name.removesuffix(".weight") not in layers
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # tied ones get their own
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in to_gptq(layer).items()}
    save_settings(model, tokenizer, folder)
    grids = {name: layer.grid for name, layer in layers.items()}
    write_gptq_config(folder, gptq_config(grids, linears(model).keys() - layers.keys()))
    save_torch_state_dict(tensors, folder, max_shard_size="5GB", metadata={"format": "pt"})


class GptqFolder:
    """A GPTQ folder: the layers that are codes, read one at a time, and all other tensors.

    Raises:
        ArtifactError: when the folder is not quantized, a file is damaged, or a layer's parts are missing or do not fit
            one another.
    """

    def __init__(self, folder: Path) -> None:
        settings = quantization_of(folder)
        if settings is None:
            raise ArtifactError(f"{folder} is not quantized: its config.json has no quantization_config")
        self.path, self.settings, self.reader = folder, settings, FolderReader(folder)
        named = [name.removesuffix(".qweight") for name in self.reader.names() if name.endswith(".qweight")]
        self.layers = dict.fromkeys(named)  # in order, and quick to look a name up in

    def layer(self, name: str) -> Quantized:
        """Return one quantized layer."""
        return read_layer(self.reader, name, self.settings)

    def other_names(self) -> list[str]:
        """Return the names of the tensors that are no part of a quantized layer."""
        parts = {f"{layer}.{part}" for layer in self.layers for part in GPTQ_PARTS}
        return [name for name in self.reader.names() if name not in parts]


def read_layer(reader: FolderReader, name: str, settings: Mapping[str, Any]) -> Quantized:
    """Return one quantized layer of a folder with that `quantization_config`.

    Raises:
        ArtifactError: when a part of it is missing or does not fit the others.
    """
    # Groups in order need no index, and some programs write none.
    indexed = settings.get("desc_act") or f"{name}.g_idx" in reader
    parts = {part: reader.tensor(f"{name}.{part}") for part in GPTQ_PARTS if part != "g_idx" or indexed}
    try:
        layer = from_gptq(parts, settings["bits"], settings["group_size"])
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{reader.folder}: the parts of {name} do not fit together: {error}") from None
    if not layer.grid.scale.isfinite().all():
        raise ArtifactError(f"{reader.folder}: the scales of {name} are not finite")
    return layer


def read_quantized(folder: Path) -> dict[str, Quantized]:
    """Return every quantized layer of a GPTQ folder, by name.

    Raises:
        ArtifactError: when the folder is not quantized, or a part of a layer is missing or does not fit the others.
    """
    stored = GptqFolder(folder)
    return {name: stored.layer(name) for name in stored.layers}


def read_grids(folder: Path, names: Iterable[str]) -> dict[str, Grid]:
    """Return the grids of those of these layers that are quantized, without holding all codes at once.

    Raises:
        ArtifactError: when the folder is not quantized, or a part of a layer is missing or does not fit the others.
    """
    stored = GptqFolder(folder)
    return {name: stored.layer(name).grid for name in names if name in stored.layers}


def load_dequantized(spec: ModelSpec) -> PreTrainedModel:
    """Load a GPTQ folder as an ordinary float model: every layer's weight is the value of its codes.

    Raises:
        ArtifactError: when tensors are missing, or there are some that the model does not know.
    """
    return _assemble(spec, packed=False)


def load_packed(spec: ModelSpec) -> PreTrainedModel:
    """Load a GPTQ folder with a `PackedLinear` in the place of every quantized layer: codes stay codes in memory.

    Raises:
        ArtifactError: when tensors are missing, or there are some that the model does not know.
    """
    return _assemble(spec, packed=True)


def _assemble(spec: ModelSpec, packed: bool) -> PreTrainedModel:
    """Build the modules without weights, put each quantized layer's codes or values in, then all other tensors.

    transformers' own GPTQ loader is not used: it needs a GPTQ runtime, and cannot keep codes beside an adapter.
    """
    stored = GptqFolder(spec.path)
    state, dtype = _other_tensors(stored, spec.dtype)
    with quiet_transformers(), init_empty_weights():  # no memory for floats that are not stored
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
        del config.quantization_config
        made = stock_class(config).from_config(config, dtype=dtype, trust_remote_code=spec.trust_remote_code)
        model: PreTrainedModel = as_linears(made)
    _check_head(model, stored)
    from_stored(model, state)  # before the codes, which are [out, in] in every family
    for name in stored.layers:  # one at a time: codes take a byte each until they are packed
        _put_layer(model, name, stored, state, dtype, packed)
    _load_state(model, state, spec.path)
    if (spec.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(spec.path)
    model.requires_grad_(False)
    return model.eval()


def _other_tensors(stored: GptqFolder, dtype: str | None) -> tuple[dict[str, Tensor], torch.dtype]:
    """Read what is not quantized, in one precision: `dtype`, or else that of the first tensor of floats."""
    # Old Llamas store the frequencies of their positions, which every model computes anew.
    names = [name for name in stored.other_names() if not name.endswith("rotary_emb.inv_freq")]
    state = {name: stored.reader.tensor(name) for name in names}
    floats = (tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    precision: torch.dtype = getattr(torch, dtype) if dtype else next(floats, torch.float32)
    return {name: t.to(precision) if t.is_floating_point() else t for name, t in state.items()}, precision


def _check_head(model: PreTrainedModel, stored: GptqFolder) -> None:
    """Check that a quantized head is not tied to the embedding, which is floats.

    Raises:
        ArtifactError: saying what to change in config.json.
    """
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), "")
    if head in stored.layers and model.config.get_text_config().tie_word_embeddings:
        raise ArtifactError(
            f"{stored.path}: {head} is quantized, and config.json ties it to the embedding, which is not; "
            "set tie_word_embeddings to false there if the head is its own"
        )


def _put_layer(
    model: PreTrainedModel, name: str, stored: GptqFolder, state: dict[str, Tensor], dtype: torch.dtype, packed: bool
) -> None:
    """Put one quantized layer into the model as a `PackedLinear`, or into `state` as the value of its codes.

    Args:
        model: changed in place.
        name: of the layer.
        stored: the folder it is read from.
        state: the tensors that the model will be given; changed in place.
        dtype: the model's precision.
        packed: whether codes stay codes.

    Raises:
        ArtifactError: when the model has no linear layer of that name and shape.
    """
    layer = stored.layer(name)
    try:
        linear: nn.Module | None = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear) or layer.codes.shape != (linear.out_features, linear.in_features):
        raise ArtifactError(
            f"{stored.path}: {name} holds codes {list(layer.codes.shape)}, which belong to no layer of "
            f"{type(model).__name__}"
        )
    if linear.bias is None and not state.get(f"{name}.bias", torch.ones(1)).any():
        del state[f"{name}.bias"]  # some programs write one of zeros for every layer
    if packed:
        bias = nn.Parameter(state[f"{name}.bias"], requires_grad=False) if linear.bias is not None else None
        model.set_submodule(name, PackedLinear(PackedWeight(layer, None, dtype), bias))
    else:
        state[f"{name}.weight"] = dequantize(layer).to(dtype)


def _load_state(model: PreTrainedModel, state: Mapping[str, Tensor], folder: Path) -> None:
    """Give a model without weights its tensors.

    Raises:
        ArtifactError: naming a tensor that is missing, that the model does not know, or that is not finite.
    """
    result = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()  # a tied head need not be stored
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if unlike := missing or result.unexpected_keys:
        raise ArtifactError(f"{folder} and {type(model).__name__} disagree about tensor {unlike[0]}")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ArtifactError(f"{folder}: tensor {name} holds values that are not finite")
