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
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sqft.checkpoints.gptq import GPTQ_PARTS, gptq_config, gptq_settings, write_gptq_config
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize
from sqft.kernels.packing import from_gptq, to_gptq
from sqft.modeling.adapters.frozen_weight import PackedLinear, PackedWeight
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import Transposed, as_linears, as_stored
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.transformers_io import save_settings
from sqft.types import Grid, Quantized


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """The `quantization_config` of a model folder; None when its weights are floats.

    Raises:
        SqftError: when it is another format than GPTQ's, version 1.
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
        for name, tensor in as_stored(model, fused=False).items()
        if name.removesuffix(".weight") not in layers
    }
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}  # tied ones get their own
    for name, layer in layers.items():
        tensors |= {f"{name}.{part}": tensor.cpu() for part, tensor in to_gptq(layer).items()}
    save_settings(model, tokenizer, folder)
    grids = {name: layer.grid for name, layer in layers.items()}
    write_gptq_config(folder, gptq_config(grids, linears(model).keys() - layers.keys()))
    save_torch_state_dict(tensors, folder, max_shard_size="5GB", metadata={"format": "pt"})


def read_quantized(folder: Path) -> dict[str, Quantized]:
    """Every quantized layer of a GPTQ folder, by name.

    Raises:
        ArtifactError: when a part of a layer is missing or does not fit the others.
    """
    settings = quantization_of(folder)
    if settings is None:
        raise ArtifactError(f"{folder} is not quantized: its config.json has no quantization_config")
    reader = FolderReader(folder)
    return {name: read_layer(reader, name, settings) for name in layers_of(reader)}


def read_grids(folder: Path, names: Iterable[str]) -> dict[str, Grid]:
    """The grids of those of these layers that are quantized, without holding all codes at once.

    Raises:
        ArtifactError: when a part of a layer is missing or does not fit the others.
    """
    settings, reader = quantization_of(folder), FolderReader(folder)
    assert settings is not None
    quantized = set(layers_of(reader))
    return {name: read_layer(reader, name, settings).grid for name in names if name in quantized}


def layers_of(reader: FolderReader) -> list[str]:
    """The names of a GPTQ folder's quantized layers."""
    return [name.removesuffix(".qweight") for name in reader.names() if name.endswith(".qweight")]


def read_layer(reader: FolderReader, name: str, settings: Mapping[str, Any]) -> Quantized:
    """One quantized layer of a GPTQ folder with that `quantization_config`.

    Raises:
        ArtifactError: when a part of it is missing or does not fit the others.
    """
    # Groups in order need no index, and some programs write none.
    indexed = settings.get("desc_act") or f"{name}.g_idx" in reader.names()
    parts = {part: reader.tensor(f"{name}.{part}") for part in GPTQ_PARTS if part != "g_idx" or indexed}
    try:
        layer = from_gptq(parts, settings["bits"], settings["group_size"])
    except (KeyError, RuntimeError, ValueError, IndexError) as error:
        raise ArtifactError(f"{reader.folder}: the parts of {name} do not fit one another: {error}") from None
    if not layer.grid.scale.isfinite().all():
        raise ArtifactError(f"{reader.folder}: the scales of {name} are not finite")
    return layer


def load_dequantized(spec: ModelSpec) -> PreTrainedModel:
    """Load a GPTQ folder as an ordinary float model: every layer's weight is what its codes stand for.

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
    folder = spec.path
    config = AutoConfig.from_pretrained(folder, trust_remote_code=spec.trust_remote_code)
    del config.quantization_config
    settings, reader = quantization_of(folder), FolderReader(folder)
    assert settings is not None
    layers = layers_of(reader)
    parts = {f"{name}.{part}" for name in layers for part in GPTQ_PARTS}
    # Old Llamas store the frequencies of their positions, which every model makes anew.
    wanted_names = [n for n in reader.names() if n not in parts and not n.endswith("rotary_emb.inv_freq")]
    state = {name: reader.tensor(name) for name in wanted_names}
    floats = (tensor.dtype for tensor in state.values() if tensor.is_floating_point())
    dtype: torch.dtype = getattr(torch, spec.dtype) if spec.dtype else next(floats, torch.float32)
    state = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with init_empty_weights():  # no memory for floats that are not there
        model: PreTrainedModel = as_linears(
            AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=spec.trust_remote_code)
        )
    modules = dict(model.named_modules())
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), "")
    if head in layers and config.get_text_config().tie_word_embeddings:
        raise ArtifactError(
            f"{folder}: {head} is quantized, and config.json ties it to the embedding, which is not; "
            "set tie_word_embeddings to false there if the head is its own"
        )
    for name in layers:  # one at a time: codes take a byte each until they are packed
        layer, linear = read_layer(reader, name, settings), modules.get(name)
        if not isinstance(linear, nn.Linear) or layer.codes.shape != (linear.out_features, linear.in_features):
            raise ArtifactError(
                f"{folder}: {name} holds codes {list(layer.codes.shape)}, which are no layer of {type(model).__name__}"
            )
        if linear.bias is None and not state.get(f"{name}.bias", torch.ones(1)).any():
            del state[f"{name}.bias"]  # some programs write one of zeros for every layer
        if packed:
            bias = nn.Parameter(state[f"{name}.bias"], requires_grad=False) if linear.bias is not None else None
            model.set_submodule(name, PackedLinear(PackedWeight(layer, None, dtype), bias))
        else:
            state[f"{name}.weight"] = dequantize(layer).to(dtype)
    for name, module in model.named_modules():
        if isinstance(module, Transposed) and name not in layers:
            state[f"{name}.weight"] = state[f"{name}.weight"].T.contiguous()
    wrong = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()  # a tied head need not be stored
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if missing or wrong.unexpected_keys:
        odd = (missing or wrong.unexpected_keys)[0]
        raise ArtifactError(f"{folder} and {type(model).__name__} disagree about tensor {odd}")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ArtifactError(f"{folder}: tensor {name} holds values that are not finite")
    model.requires_grad_(False)
    return model.eval()
