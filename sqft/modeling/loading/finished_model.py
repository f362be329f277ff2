"""A finished model's folder, floats or codes, as exporters see it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.checkpoints.gptq import GPTQ_FILE, GPTQ_PARTS
from sqft.errors import ArtifactError
from sqft.kernels.grids import dequantize
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.quantized import layers_of, quantization_of, read_layer
from sqft.types import Quantized
from sqft.utils.files import write_json

CARRIED = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".spm", ".bpe", ".py", ".md"}
"""Suffixes of what lies beside the weights: configs, tokenizer, chat templates, custom code, the model's card."""


BARE = {"LICENSE", "NOTICE"}


class FinishedModel:
    """A model folder that a step wrote, one tensor at a time; a `sqft.types.ModelReader`.

    Raises:
        SqftError: when the folder is quantized in another format than GPTQ's, version 1.
        ArtifactError: when a file is damaged or a tensor is missing; the message names it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = FolderReader(folder)
        self._settings: dict[str, Any] | None = quantization_of(folder)
        self._layers = layers_of(self._files) if self._settings else []
        # A layer's parts stand for its weight.
        parts = {f"{layer}.{part}" for layer in self._layers for part in GPTQ_PARTS}
        self._floats = [name for name in self._files.names() if name not in parts]

    def names(self) -> Sequence[str]:
        return sorted([*self._floats, *(f"{layer}.weight" for layer in self._layers)])

    def tensor(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        if layer == name or layer not in self._layers:
            return self._files.tensor(name)
        return dequantize(self.codes(layer)).to(self._dtype)

    def quantized(self) -> Sequence[str]:
        return self._layers

    def codes(self, layer: str) -> Quantized:
        if self._settings is None or layer not in self._layers:
            raise ArtifactError(f"{self.folder}: {layer} is on no grid")
        return read_layer(self._files, layer, self._settings)

    def copy_settings(self, folder: Path) -> None:
        for file in [*self.folder.iterdir(), *self.folder.glob("additional_chat_templates/*.jinja")]:
            known = file.suffix in CARRIED or file.stem in BARE
            # What tells of the weights is written anew with them; an old index would be loaded.
            stale = file.name.endswith(".index.json") or file.name == GPTQ_FILE
            if known and file.is_file() and not stale:
                target = folder / file.relative_to(self.folder)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)  # not its mode: a read-only config could not be rewritten
        if self._settings is not None:
            config = json.loads((folder / "config.json").read_text("utf-8"))
            del config["quantization_config"]
            write_json(folder / "config.json", config)

    @cached_property
    def _dtype(self) -> torch.dtype:
        """The precision of the weights that stayed floats, which the others are read in."""
        floats = (self._files.tensor(name).dtype for name in self._floats)
        return next((dtype for dtype in floats if dtype.is_floating_point), torch.float32)
