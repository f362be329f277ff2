"""Quantized models as folders: GPTQ checkpoints, version 1, written and read."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub import save_torch_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from sqft.checkpoints.gptq import GPTQ_PARTS, config_of, gptq_settings, grid_settings, write_gptq_config
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError
from sqft.kernels.finite import all_finite
from sqft.kernels.grids import dequantize
from sqft.kernels.packing import from_gptq, to_gptq
from sqft.modeling.adapters.frozen_weight import PackedLinear, PackedWeight
from sqft.modeling.architecture.blocks import block_list, towers, unquantized
from sqft.modeling.architecture.experts import Experts
from sqft.modeling.architecture.frozen import freeze
from sqft.modeling.architecture.linears import as_linears, as_stored, put_tensor, stored_transposed, tie
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.compat import keep_conversions, kept_conversions, load_converted, reverted
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.transformers_io import as_in_source, quiet_transformers, save_settings, stock_class
from sqft.types import Grid, Quantized
from sqft.utils.resources import return_freed_memory


def quantization_of(folder: Path) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model folder; None when its weights are floats.

    Raises:
        ModelError: when it is another format than GPTQ's, version 1.
    """
    return gptq_settings(folder, json.loads((folder / "config.json").read_text("utf-8")))


def save_quantized(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, Quantized],
    folder: Path,
    source: ModelSpec | None = None,
) -> None:
    """Write a GPTQ folder: the layers' codes and grids, everything else as the model has it.

    `lm_head.weight` is stored even where it is tied: a consumer that does not tie it would otherwise load zeros
    without a word.

    Args:
        model: after `as_linears`.
        tokenizer: the model's.
        layers: the quantized layers, by the names of their modules.
        folder: is made.
        source: what the model was loaded from; see `save_model`.
    """
    names = CheckpointNames(model)
    tensors = tensors_of_codes(names, layers, other_tensors(model, names, layers, source))
    grids = {name: grid_settings(layer.grid) for name, layer in layers.items()}
    save_settings_of_codes(model, tokenizer, names, grids, folder, source)
    save_torch_state_dict(tensors, folder, max_shard_size="5GB", metadata={"format": "pt"})


def tensors_of_codes(
    names: CheckpointNames, layers: Mapping[str, Quantized], others: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of a GPTQ folder: the parts of these layers, and `other_tensors`."""
    tensors: dict[str, Tensor] = {}
    taken = set[int]()
    for name, tensor in others.items():  # tied ones, and parts of others, get memory of their own
        memory = tensor.untyped_storage()
        own = memory.nbytes() == tensor.nbytes and tensor.is_contiguous() and memory.data_ptr() not in taken
        tensors[name] = tensor if own else tensor.contiguous().clone()
        taken.add(memory.data_ptr())
    for name, layer in layers.items():
        tensors |= {f"{names.name_of_codes(name)}.{part}": tensor.cpu() for part, tensor in to_gptq(layer).items()}
    return tensors


def save_settings_of_codes(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: CheckpointNames,
    grids: Mapping[str, Mapping[str, Any]],
    folder: Path,
    source: ModelSpec | None = None,
) -> None:
    """Write all of a GPTQ folder but its tensors.

    Args:
        model: after `as_linears`.
        tokenizer: the model's.
        names: those of its checkpoint.
        grids: the `grid_settings` of each quantized layer, by the names of their modules.
        folder: is made.
        source: what the model was loaded from.
    """
    save_settings(model, tokenizer, folder, source)
    floats = unquantized(model, grids)
    named = {*floats, *map(names.name_of_codes, floats)}
    write_gptq_config(folder, config_of(grids, named, towers(model), block_list(model)))


def other_tensors(
    model: PreTrainedModel,
    names: CheckpointNames,
    layers: Collection[str],
    source: ModelSpec | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Return what a GPTQ folder holds of a model, or of `state`, a part of it, besides these layers' codes, by the
    names of its checkpoint.

    See `save_quantized` for the other arguments.
    """
    state = model.state_dict() if state is None else state
    floats = {name: tensor for name, tensor in state.items() if name.removesuffix(".weight") not in layers}
    own, mixtures = as_stored(model, codes=layers, state=floats), _mixtures_of(model, layers)
    apart = {name: tensor for name, tensor in own.items() if name.startswith(mixtures)}
    stored = reverted(model, {name: tensor for name, tensor in own.items() if name not in apart})
    for name, tensor in apart.items():
        layer, _, part = name.rpartition(".")
        stored[f"{names.name_of_codes(layer)}.{part}"] = tensor
    return as_in_source(model, stored, source)


def _mixtures_of(model: nn.Module, layers: Iterable[str]) -> tuple[str, ...]:
    """Return the starts of the names of the experts in those mixtures that have one of these layers."""
    mixtures = {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
    owners = {layer.rpartition(".")[0].rpartition(".")[0] for layer in layers}
    return tuple(f"{name}.{index}." for name in owners & mixtures.keys() for index in range(mixtures[name].count))


class GptqFolder:
    """A GPTQ folder: the layers that are codes, read one at a time, and all other tensors.

    Args:
        folder: the folder.
        names: those of a model that it holds; layers then go by the names of the modules, otherwise by their own.

    Raises:
        ArtifactError: when the folder is not quantized, a file is damaged, or a layer's parts are missing or do not fit
            one another.
    """

    def __init__(self, folder: Path, names: CheckpointNames | None = None) -> None:
        settings = quantization_of(folder)
        if settings is None:
            raise ArtifactError(f"{folder} is not quantized: its config.json has no quantization_config")
        self.path, self.settings, self.reader = folder, settings, FolderReader(folder)
        self._stored = [name.removesuffix(".qweight") for name in self.reader.names() if name.endswith(".qweight")]
        layers = ((names.layer(name) if names else name, name) for name in self._stored)
        self.layers = {layer: name for layer, name in layers if names is None or layer in names.linears}
        """Layer -> its name in the folder, in order; without those that the model has no place for."""

    def layer(self, name: str) -> Quantized:
        """Return one quantized layer."""
        return read_layer(self.reader, self.layers[name], self.settings)

    def other_names(self) -> list[str]:
        """Return the names of the tensors that are no part of a quantized layer."""
        parts = {f"{layer}.{part}" for layer in self._stored for part in GPTQ_PARTS}
        return [name for name in self.reader.names() if name not in parts]

    def float_names(self) -> list[str]:
        """Return the names of the tensors that the folder would hold if all its layers were floats."""
        return [*self.other_names(), *(f"{name}.weight" for name in self._stored)]


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
    if not all_finite(layer.grid.scale):
        raise ArtifactError(f"{reader.folder}: tensor {name}.scales holds values that are not finite")
    return layer


def read_quantized(folder: Path, names: CheckpointNames | None = None) -> dict[str, Quantized]:
    """Return every quantized layer of a GPTQ folder; see `GptqFolder` for its name.

    Raises:
        ArtifactError: when the folder is not quantized, or a part of a layer is missing or does not fit the others.
    """
    stored = GptqFolder(folder, names)
    return {name: stored.layer(name) for name in stored.layers}


def read_grids(folder: Path, layers: Iterable[str], names: CheckpointNames | None = None) -> dict[str, Grid]:
    """Return the grids of those of these layers that are quantized, without holding all codes at once.

    Raises:
        ArtifactError: when the folder is not quantized, or a part of a layer is missing or does not fit the others.
    """
    stored = GptqFolder(folder, names)
    return {name: stored.layer(name).grid for name in layers if name in stored.layers}


def load_dequantized(spec: ModelSpec) -> PreTrainedModel:
    """Load a GPTQ folder as an ordinary float model: every layer's weight is the value of its codes.

    Raises:
        ArtifactError: when tensors are missing, or are not as the model has them.
    """
    return _assemble(spec, packed=False)


def load_packed(spec: ModelSpec) -> PreTrainedModel:
    """Load a GPTQ folder with a `PackedLinear` in the place of every quantized layer: codes stay codes in memory.

    Raises:
        ArtifactError: when tensors are missing, or are not as the model has them.
    """
    return _assemble(spec, packed=True)


def _assemble(spec: ModelSpec, packed: bool) -> PreTrainedModel:
    """Build the modules without weights, give them all tensors that are floats, then each quantized layer's codes or
    values.

    transformers' own GPTQ loader is not used: it needs a GPTQ runtime, and cannot keep codes beside an adapter.
    """
    stored = GptqFolder(spec.path)
    # Old Llamas store the frequencies of their positions, which every model computes anew.
    others = [name for name in stored.other_names() if not name.endswith("rotary_emb.inv_freq")]
    floats = {name: stored.reader.tensor(name) for name in others}
    with quiet_transformers(), init_empty_weights():  # no memory for floats that are not stored
        config = AutoConfig.from_pretrained(spec.path, trust_remote_code=spec.trust_remote_code)
        del config.quantization_config
        stored_as = (tensor.dtype for tensor in floats.values())
        dtype = getattr(torch, spec.dtype) if spec.dtype else precision_of(config.dtype, stored_as)
        model: PreTrainedModel = stock_class(config).from_config(
            config, dtype=dtype, trust_remote_code=spec.trust_remote_code
        )
    shapes = as_linears(copy.deepcopy(model))  # as it will be: gives names before tensors are there
    names = CheckpointNames(shapes, stored.float_names())
    stored = GptqFolder(spec.path, names)
    apart = _take_apart(floats, shapes, names, stored)
    with quiet_transformers():
        unlike = load_converted(model, floats)
    as_linears(model)
    keep_conversions(model, kept_conversions(shapes))
    for name, tensor in apart.items():
        put_tensor(model, name, tensor.to(dtype))
    _check_head(model, stored)
    for name in stored.layers:  # one at a time: codes take a byte each until they are packed
        _put_layer(model, name, stored, dtype, packed)
        if packed:
            return_freed_memory()
    _check_complete(model, spec.path, unlike)
    if (spec.path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(spec.path)
    return freeze(model).eval()


def precision_of(stated: torch.dtype | None, stored: Iterable[torch.dtype]) -> torch.dtype:
    """Return the precision of a model: the one that its config states, if some tensor has it, or the first tensor's."""
    found = [dtype for dtype in stored if dtype.is_floating_point]
    return stated if stated is not None and stated in found else next(iter(found), torch.float32)


def _take_apart(
    floats: dict[str, Tensor], model: PreTrainedModel, names: CheckpointNames, stored: GptqFolder
) -> dict[str, Tensor]:
    """Take from the tensors of a folder those that transformers cannot load beside codes: experts of a mixture that has
    codes too. They are returned by the names of their modules' tensors.

    Args:
        floats: the folder's tensors of floats by name; changed in place.
        model: on the meta device, after `as_linears`.
        names: its names in the folder.
        stored: the folder, by the names of the modules.
    """
    modules, known = {name for name, _ in model.named_modules()}, model.state_dict().keys()
    mixtures, apart = _mixtures_of(model, stored.layers), dict[str, Tensor]()
    for name in list(floats) if mixtures else ():
        owner, _, part = name.rpartition(".")
        layer = names.layer(owner)
        tensor = f"{layer}.{part}" if layer in modules else names.module_tensor(name)
        if tensor in known and tensor.startswith(mixtures):
            apart[tensor] = floats.pop(name)
    return apart


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


def _put_layer(model: PreTrainedModel, name: str, stored: GptqFolder, dtype: torch.dtype, packed: bool) -> None:
    """Put one quantized layer into the model, as a `PackedLinear` or as the value of its codes.

    Args:
        model: changed in place.
        name: of the layer's module.
        stored: the folder it is read from.
        dtype: the model's precision.
        packed: whether codes stay codes.

    Raises:
        ArtifactError: when the model's layer has another shape.
    """
    layer, linear = stored.layer(name), cast("nn.Linear", model.get_submodule(name))
    if layer.codes.shape != (linear.out_features, linear.in_features):
        raise ArtifactError(
            f"{stored.path}: {stored.layers[name]} holds codes {list(layer.codes.shape)}, and config.json makes it "
            f"{[linear.out_features, linear.in_features]}"
        )
    if packed:
        base = PackedWeight(layer, None, dtype)
        model.set_submodule(name, PackedLinear(base, linear.bias, stored_transposed(linear)))
    else:
        linear.weight = nn.Parameter(dequantize(layer).to(dtype), requires_grad=False)


def _check_complete(model: PreTrainedModel, folder: Path, unlike: Sequence[str]) -> None:
    """Tie what is tied, and check that the model has all its tensors.

    Args:
        model: after loading; others than its own tensors are left out, as they are from a folder of floats.
        folder: for messages.
        unlike: tensors of another shape.

    Raises:
        ArtifactError: naming a tensor that is missing, mis-shaped or not finite.
    """

    def alike(*names: str) -> bool:  # what is stored with values of its own is not tied, as in transformers
        one, other = map(model.get_parameter, names)
        return bool(one.is_meta or other.is_meta or one.equal(other))

    # A tied head need not be stored.
    tie(model, {one: other for one, other in model.all_tied_weights_keys.items() if alike(one, other)})
    missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if disagreeing := [*missing, *unlike]:
        raise ArtifactError(f"{folder} and {type(model).__name__} disagree about tensor {disagreeing[0]}")
    for name, parameter in model.named_parameters():
        if not all_finite(parameter):
            raise ArtifactError(f"{folder}: tensor {name} holds values that are not finite")
