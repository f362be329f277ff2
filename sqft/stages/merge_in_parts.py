"""Merge into a base that is in memory one decoder block at a time.

The model that was trained and the merged one run once each, on a few examples: a block is read when the model comes to
it. On the way through the first, each block's merged weights are written.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from sqft.checkpoints.gptq import grid_settings
from sqft.checkpoints.model_spec import ModelSpec
from sqft.components.kinds import Merger
from sqft.data.encoding import Example
from sqft.errors import ArtifactError
from sqft.kernels import grids
from sqft.kernels.checksums import sha256
from sqft.kernels.finite import all_finite
from sqft.modeling.adapters.adapted_linear import MergedLinear, set_ranks
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.calibration.capture import Hold, held_in_turn
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.parts import OUTSIDE, PartedModel, WholeModel
from sqft.modeling.loading.quantized import GptqFolder
from sqft.stages.adapter_in_parts import AdapterInParts
from sqft.stages.inputs import Report, StageInputs
from sqft.stages.logits import logits_difference, logits_of
from sqft.stages.merge_layer import Merged, merge_layer, report_of, warn_of_zero_points
from sqft.stages.step_parts import StepParts
from sqft.types import COMPARED_TOKENS
from sqft.utils.digests import Digests


class MergeInParts:
    """A merge whose models are read and written one part at a time.

    Args:
        inputs: the stage's.
        source: the base, a folder.
    """

    def __init__(self, inputs: StageInputs, source: ModelSpec) -> None:
        self.inputs, self.source, self.folder = inputs, source, inputs.scratch / "model"
        self.step = inputs.plan.step("finetune")
        self.merger, self.label = self.step.component(Merger), self.step.label(Merger)
        self.parts = StepParts(inputs, source, _leave)
        self.tokenizer = self.parts.tokenizer
        self.files = ""  # digest of the folder that the logits are of
        self.adapter = AdapterInParts(inputs, self.parts.opened, source)
        self.bases, self.linears = self.adapter.bases, self.adapter.linears
        trained = self.adapter.attach_all(self.tokenizer)
        self.multipliers = {name: layer.scale_multiplier for name, layer in trained.layers.items()}
        self.adapter.detach(list(trained.layers))
        self.ranks = trained.space.ranks_by_linear(read_ranks(inputs.folders["search"]))

    def run(self, examples: Sequence[Example]) -> Report:
        """Write `model/`; return how many weights are zero before and after, and how far the logits lie apart.

        Raises:
            ArtifactError: when the merged model is not the one that was trained.
        """
        opened, ids = self.parts.opened, _batch(examples)
        with self._merging(OUTSIDE):  # sealed first: what is outside is held as long as the model runs
            pass
        expected = _logits(opened, self._merging, ids)
        for block in opened.blocks:
            if block not in self.parts.records:  # the model does not run it
                with self._merging(block):
                    pass
        self.parts.writer.write_index()
        self.bases.save_settings(self.tokenizer, self.folder, self.parts.all("grids"))
        self.files = Digests().path(self.folder)
        stored = PartedModel(self.inputs.plan.spec(self.folder))
        difference = logits_difference([(_logits(stored, stored.held, ids), expected)])
        return {**self._report(), "logits_difference": difference}

    def verify(self) -> None:
        """Check that all tensors as stored are those trained through, or the base's, bit for bit; codes and grids too.
        That the zeros which the merger promises to keep are zero was checked when the weights were made."""
        stored, expected = PartedModel(self.inputs.plan.spec(self.folder)), self.parts.all("tensors")
        codes = self.parts.all("codes")
        for part in stored.parts:
            with stored.held(part):
                for name, tensor in stored.tensors(part).items():
                    if not all_finite(tensor):
                        raise ArtifactError(f"merge ({self.label}): {name} as stored holds values that are not finite")
                    if sha256(tensor) != expected.get(name):
                        raise ArtifactError(
                            f"merge ({self.label}): {name} as stored is not the weight that training used"
                        )
        layers = GptqFolder(self.folder, stored.names) if codes else None
        for name in codes.keys() | (layers.layers.keys() if layers else set()):
            if not layers or name not in layers.layers or grids.digest_of(layers.layer(name)) != codes.get(name):
                raise ArtifactError(
                    f"merge ({self.label}): codes or grid of {name} as stored are not those that training used"
                )
        if Digests().path(self.folder) != self.files:
            raise ArtifactError(f"merge ({self.label}): {self.folder} has changed since it was read back")

    def _report(self) -> Report:
        bits = next((grid["bits"] for grid in self.parts.all("grids").values()), None)
        if any(self.parts.all("zero_points_of_0").values()):
            warn_of_zero_points()
        return report_of(self.parts.all("layers").values(), bits)

    @contextmanager
    def _merging(self, part: str) -> Iterator[None]:
        """Have a part in memory as it was trained; when it was used, write it merged, if it is not written as yet."""
        merged: dict[str, Merged] = {}
        with self.parts.held(part, begin=lambda _: None, end=partial(self._end, merged=merged)):
            layers = self.adapter.attach(part)
            for name, layer in layers.items():
                layer.scale_multiplier = self.multipliers[name]
            set_ranks(layers, self.ranks)
            try:
                yield
                if part not in self.parts.records:
                    for name, layer in layers.items():
                        if isinstance(layer, MergedLinear):
                            merged[name] = self._merged(name, layer)
            finally:
                self.adapter.detach(list(layers))

    def _merged(self, name: str, layer: MergedLinear) -> Merged:
        """Merge a layer.

        Raises:
            ArtifactError: when a zero that the merger promises to keep is none.
        """
        merged = merge_layer(layer, self.bases.before(name), self.inputs.device)
        if self.merger.keeps_mask and merged.lost:
            raise ArtifactError(f"merge ({self.label}): {merged.lost} zeros of the base are not zero in {name}.weight")
        return merged

    def _end(self, part: str, merged: dict[str, Merged]) -> None:
        """Put the merged weights of a part in the place of the base's, and seal it."""
        opened = self.parts.opened
        for name, one in merged.items():
            linear = self.linears[name]
            linear.weight = nn.Parameter(one.weight.to(linear.weight.dtype), requires_grad=False)
        layers = self.bases.coded(part, {name: one.codes for name, one in merged.items() if one.codes})
        record = {
            "tensors": {name: sha256(tensor) for name, tensor in opened.tensors(part).items()},
            "layers": {name: one.counts for name, one in merged.items()},
            "codes": {name: grids.digest_of(layer) for name, layer in layers.items()},
            "grids": {name: grid_settings(layer.grid) for name, layer in layers.items()},
            "zero_points_of_0": {name: bool((layer.grid.zero == 0).any()) for name, layer in layers.items()},
        }
        self.parts.seal(part, record, lambda: self.bases.tensors(part, layers), {})


def _leave(opened: WholeModel, part: str, written: FolderReader) -> None:
    """Leave a part that is written as the base has it: the model that was trained goes through it again."""


def _logits(opened: WholeModel, hold: Hold, ids: Tensor) -> Tensor:
    """Return the logits of a model whose blocks are held in turn; see `logits_of`."""
    blocks = {name: opened.model.get_submodule(name) for name in opened.blocks}
    with opened.held(OUTSIDE), held_in_turn(blocks, hold):
        return logits_of(opened.model, ids)


def _batch(examples: Sequence[Example]) -> Tensor:
    """Return the beginnings of examples as token ids [examples, tokens], shorter ones with their last token again."""
    rows = [example.input_ids[:COMPARED_TOKENS] for example in examples]
    length = max(map(len, rows))
    return torch.tensor([(*row, *row[-1:] * (length - len(row))) for row in rows])
