"""What lies under the adapters of a model that is merged one part at a time, and how the merged part is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sqft.checkpoints.model_spec import ModelSpec
from sqft.kernels.masks import unpack_mask
from sqft.modeling.adapters.frozen_weight import FloatWeight, FrozenWeight, PackedWeight
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.part_writer import float_tensors
from sqft.modeling.loading.parts import PartedModel, WholeModel
from sqft.modeling.loading.quantized import GptqFolder, other_tensors, save_settings_of_codes, tensors_of_codes
from sqft.modeling.loading.transformers_io import save_settings
from sqft.planning.adapter_base import AdapterBase
from sqft.types import Quantized


class FloatBases:
    """Floats, which the merged weights take the place of.

    Args:
        opened: the model, one part of it held at a time.
        linears: its layers that have adapters, by name.
        source: the folder it is read from.
        masked: whether what is zero stays zero.
    """

    def __init__(self, opened: WholeModel, linears: Mapping[str, nn.Linear], source: ModelSpec, masked: bool) -> None:
        self.opened, self.linears, self.source, self.masked = opened, linears, source, masked

    def outline(self, name: str, with_grid: bool) -> FrozenWeight:
        """Return a base of a layer's shape that has no values; with its grid, where factors of the scales train too."""
        return FloatWeight(self.linears[name].weight, self.masked)

    def bases(self, part: str, names: Sequence[str]) -> dict[str, FrozenWeight]:
        """Return the bases of layers of a part that is held."""
        return {name: FloatWeight(self.linears[name].weight, self.masked) for name in names}

    def before(self, name: str) -> Quantized | None:
        """Return a layer's codes as the base has them; None where it has none."""
        return None

    def coded(self, part: str, merged: Mapping[str, Quantized]) -> dict[str, Quantized]:
        """Return the layers of a part that are stored as codes: those that were merged, and as they are those that have
        no adapter."""
        return {}

    def tensors(self, part: str, layers: Mapping[str, Quantized]) -> Mapping[str, Tensor]:
        """Return what is stored of a part that is held, merged; `layers` are those stored as codes."""
        return float_tensors(self.opened, part, self.source)

    def save_settings(
        self, tokenizer: PreTrainedTokenizerBase, folder: Path, codes: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Write all of the merged folder but its tensors; `codes` are the settings of each layer's grid."""
        save_settings(self.opened.model, tokenizer, folder, self.source)


class CodeBases(FloatBases):
    """Codes, or the floats from before they were quantized; merged into codes on the same grids.

    Args:
        opened: the model with the values of its codes, one part of it held at a time.
        linears: its layers that have adapters, by name.
        source: the GPTQ folder it is read from.
        start: `finetune.base`.
        floats: the model that was quantized.
        base: where masks and residuals are.
        folders: artifacts by role.
    """

    def __init__(
        self,
        opened: WholeModel,
        linears: Mapping[str, nn.Linear],
        source: ModelSpec,
        start: str,
        floats: ModelSpec,
        base: AdapterBase,
        folders: Mapping[str, Path],
    ) -> None:
        super().__init__(opened, linears, source, masked=True)  # what is zero under codes stays zero
        self.stored, masks = GptqFolder(source.path, opened.names), base.masks(folders)
        self.floats = PartedModel(floats) if start == "floats" else None
        self.masks = _file(masks) if masks and not self.floats else None
        self.residuals = _file(base.residuals(folders)) if start == "compensated" else None

    def outline(self, name: str, with_grid: bool) -> FrozenWeight:
        codes = self.before(name) if with_grid else None
        return FloatWeight(self.linears[name].weight, self.masked, codes.grid if codes else None)

    def bases(self, part: str, names: Sequence[str]) -> dict[str, FrozenWeight]:
        read = self.floats.held(part) if self.floats and names else nullcontext()  # embeddings have no adapter
        with read:  # what is taken of it stays
            return {name: self._base(name) for name in names}

    def _base(self, name: str) -> FrozenWeight:
        codes, linear = self.before(name), self.linears[name]
        if codes is None:
            return FloatWeight(linear.weight, self.masked)
        if self.floats:
            return FloatWeight(self.floats.model.get_parameter(f"{name}.weight"), self.masked, codes.grid)
        base = PackedWeight(codes, None, linear.weight.dtype)
        if self.residuals:
            base.set_residual(self.residuals.tensor(name))
        if self.masks and name in self.masks:
            base.set_mask(unpack_mask(self.masks.tensor(name), (base.out_features, base.in_features)))
        return base

    def before(self, name: str) -> Quantized | None:
        return self.stored.layer(name) if name in self.stored.layers else None

    def coded(self, part: str, merged: Mapping[str, Quantized]) -> dict[str, Quantized]:
        names = [name for name in self.stored.layers if self.opened.part_of(name) == part]
        return {name: merged[name] if name in merged else self.stored.layer(name) for name in names}

    def tensors(self, part: str, layers: Mapping[str, Quantized]) -> Mapping[str, Tensor]:
        names, state = self.opened.names, self.opened.state(part)
        floats = other_tensors(self.opened.model, names, self.stored.layers, self.source, state)
        return tensors_of_codes(names, layers, floats)

    def save_settings(
        self, tokenizer: PreTrainedTokenizerBase, folder: Path, codes: Mapping[str, Mapping[str, Any]]
    ) -> None:
        save_settings_of_codes(self.opened.model, tokenizer, self.opened.names, codes, folder, self.source)


def _file(path: Path) -> FolderReader:
    return FolderReader(path.parent, [path])
