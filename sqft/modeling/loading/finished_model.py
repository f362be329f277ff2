"""A finished model's folder, floats or codes, as an exporter reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sqft.checkpoints.gptq import GPTQ_FILE
from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize
from sqft.modeling.architecture.blocks import block_list, towers, unquantized
from sqft.modeling.architecture.names import CheckpointNames
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

    def names(self) -> Sequence[str]:
        return sorted([*self._floats, *(f"{layer}.weight" for layer in self.quantized())])

    def tensor(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer == name or self._codes is None or layer not in self._codes.layers:
            tensor = self._files.tensor(name)
            if not tensor.isfinite().all():
                raise ArtifactError(f"{self.folder}: tensor {name} holds values that are not finite")
            return tensor
        return dequantize(self.codes(layer)).to(self._dtype)

    def quantized(self) -> Sequence[str]:
        return list(self._codes.layers) if self._codes else []

    def codes(self, layer: str) -> Quantized:
        if self._codes is None or layer not in self._codes.layers:
            raise ArtifactError(f"{self.folder}: {layer} is not quantized")
        return self._codes.layer(layer)

    def float_layers(self) -> Sequence[str]:
        names = CheckpointNames(self._skeleton, self.names())
        floats = unquantized(self._skeleton, {names.layer(name) for name in self.quantized()})
        return sorted({*floats, *map(names.name_of_codes, floats)})

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

    @cached_property
    def _skeleton(self) -> PreTrainedModel:
        return load_skeleton(self._spec)

    @cached_property
    def _floats(self) -> Sequence[str]:
        """The tensors that are floats; the parts of a quantized layer take its weight's place."""
        return self._codes.other_names() if self._codes else self._files.names()

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The precision of the weights that stayed floats, in which the others are returned too: what config.json
        states, where some tensor has it."""
        stored = [self._files.precisions[name] for name in self._floats if name in self._files.precisions]
        config = json.loads((self.folder / "config.json").read_text("utf-8"))
        stated = getattr(torch, str(config.get("dtype") or config.get("torch_dtype")), None)
        return stated if stated in stored else next(iter(stored), torch.float32)
