"""A finished model's folder, floats or codes, as an exporter reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sqft.checkpoints.gptq import GPTQ_FILE
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError
from sqft.kernels.finite import all_finite
from sqft.kernels.grids import dequantize
from sqft.modeling.architecture.blocks import block_list, towers, unquantized
from sqft.modeling.architecture.linears import as_stored, layers_of_stored
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.compat import keep_conversions, reverted, weight_conversions
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import GptqFolder, quantization_of
from sqft.modeling.loading.transformers_io import load_skeleton
from sqft.types import Quantized
from sqft.utils.files import write_json

COPIED_SUFFIXES = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".py", ".md"}
"""Files beside the weights: configs, tokenizer, chat templates, custom code, the model's card."""
COPIED_NAMES = {"LICENSE", "NOTICE"}
"""Files that are copied whatever their suffix."""


class FinishedModel:
    """A model folder that a step wrote, one tensor at a time; a `sqft.types.ModelReader`.

    Raises:
        ModelError: when the folder is quantized in another format than GPTQ's, version 1.
        ArtifactError: when a file is damaged, or a tensor is missing or not finite; the message names it.
    """

    def __init__(self, folder: Path, trust_remote_code: bool = False) -> None:
        self.folder, self._spec = folder, ModelSpec(folder, trust_remote_code=trust_remote_code)
        self._codes = GptqFolder(folder) if quantization_of(folder) else None
        self._files = self._codes.reader if self._codes else FolderReader(folder)
        self._last: dict[str, Tensor] | None = None

    def names(self) -> Sequence[str]:
        parts = {name for made_of in self._joined.values() for name in made_of.values()}
        return sorted({*self._stored, *self._joined} - (parts - self._joined.keys()))

    def tensor(self, name: str) -> Tensor:
        if name not in self._joined:
            return self._part(name)
        if self._last is None or name not in self._last:
            parts = {part: self._part(stored) for part, stored in self._joined[name].items()}
            self._last = reverted(self._float_model, as_stored(self._float_model, state=parts))
        return self._last[name].contiguous()

    def floats(self) -> Sequence[str]:
        return self._floats

    def quantized(self) -> Sequence[str]:
        return list(self._codes.layers) if self._codes else []

    def codes(self, layer: str) -> Quantized:
        if self._codes is None or layer not in self._codes.layers:
            raise ArtifactError(f"{self.folder}: {layer} is not quantized")
        return self._codes.layer(layer)

    def float_layers(self) -> Sequence[str]:
        floats = unquantized(self._skeleton, {self._names.layer(name) for name in self.quantized()})
        return sorted({*floats, *map(self._names.name_of_codes, floats)})

    def blocks(self) -> str:
        return block_list(self._skeleton)

    def towers(self) -> Sequence[str]:
        return sorted(towers(self._skeleton))

    def copy_settings(self, folder: Path) -> None:
        for file in [*self.folder.iterdir(), *self.folder.glob("additional_chat_templates/*.jinja")]:
            copied = file.suffix in COPIED_SUFFIXES or file.stem in COPIED_NAMES
            # What describes the weights is written anew with them; an old index would be loaded.
            stale = file.name.endswith(".index.json") or file.name == GPTQ_FILE
            if copied and file.is_file() and not stale:
                target = folder / file.relative_to(self.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)  # not its mode: a read-only config could not be rewritten
        if self._codes:
            config = json.loads((folder / "config.json").read_text("utf-8"))
            del config["quantization_config"]
            write_json(folder / "config.json", config)

    def _part(self, name: str) -> Tensor:
        """Return a tensor that the folder holds, as floats: a layer's weight is [out, in] where it has codes."""
        layer = name.removesuffix(".weight")
        if layer != name and self._codes is not None and layer in self._codes.layers:
            return dequantize(self.codes(layer)).to(self._dtype)
        tensor = self._files.tensor(name)
        if not all_finite(tensor):
            raise ArtifactError(f"{self.folder}: tensor {name} holds values that are not finite")
        return tensor

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return load_skeleton(self._spec)

    @cached_property
    def _float_model(self) -> PreTrainedModel:
        """The same without weights; `_joined` gives it the conversions of a checkpoint of floats."""
        return load_skeleton(self._spec)

    @cached_property
    def _floats(self) -> Sequence[str]:
        """The tensors that are floats; the parts of a quantized layer take its weight's place."""
        return self._codes.other_names() if self._codes else self._files.names()

    @cached_property
    def _stored(self) -> Sequence[str]:
        """The tensors that the folder would hold if each of its layers of codes had a weight."""
        return self._codes.float_names() if self._codes else self._floats

    @cached_property
    def _names(self) -> CheckpointNames:
        return CheckpointNames(self._skeleton, self._stored)

    @cached_property
    def _joined(self) -> dict[str, dict[str, str]]:
        """A tensor of the float model that is not in the folder as such -> the parts it is made of, by the names of
        their layers -> the names that these have in the folder.

        Codes are [out, in] in every family, and those of experts are stored one by one.
        """
        if self._codes is None:
            return {}
        model, meta = self._float_model, self._skeleton.state_dict()
        here = {self._tensor_of_layer(name, meta.keys()): name for name in self._stored}
        coded = {self._names.layer(name) for name in self.quantized()}
        groups: list[list[str]] = []
        for stored, parts in layers_of_stored(model).items():
            layer = parts[0].rpartition(".")[0]
            if parts[0] in here and (layer in coded if parts == [stored] else layer in self._names.unnamed):
                groups.append(parts)
        if lacking := [part for parts in groups for part in parts if part not in here]:
            raise ArtifactError(f"{self.folder} has no codes or floats of {lacking[0]}; make it again")
        states = [as_stored(model, state={part: meta[part] for part in parts}) for parts in groups]
        # What a family calls its joined experts is known only once such a name is met.
        keep_conversions(model, weight_conversions(model))
        own = [name for state in states for name in reverted(model, state)]
        CheckpointNames(model, [*self._stored, *own])
        return {
            name: {part: here[part] for part in parts}
            for parts, state in zip(groups, states, strict=True)
            for name in reverted(model, state)
        }

    def _tensor_of_layer(self, name: str, known: Collection[str]) -> str:
        """Return the tensor of the linear layers, or else of the modules, that a tensor of the folder is."""
        owner, _, part = name.rpartition(".")
        layer = f"{self._names.layer(owner)}.{part}"
        return layer if layer in known else self._names.module_tensor(name)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The precision of the weights that stayed floats, in which the others are returned too: what config.json
        states, where some tensor has it."""
        stored = [self._files.precisions[name] for name in self._floats if name in self._files.precisions]
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        return stated if stated in stored else next(iter(stored), torch.float32)
