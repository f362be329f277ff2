"""Set the least important weights to zero (paper §2.1).

Four questions, four places: the scorer says how much a weight matters, the allocator how much sparsity a layer gets,
`kernels.masks` which entries are then kept, and the updater, if there is one, which values those take.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sqft.components import checks
from sqft.components.kinds import Allocator, Scorer, Updater
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.checksums import sha256
from sqft.kernels.masks import keep_mask, pack_mask, unpack_mask
from sqft.modeling.architecture.blocks import shape_of
from sqft.modeling.calibration.capture import Hold
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.other_model import OtherModel
from sqft.modeling.loading.part_writer import float_tensors
from sqft.modeling.loading.parts import OUTSIDE, open_in_parts
from sqft.modeling.loading.transformers_io import save_model, save_settings
from sqft.recipe.sections import Sparsify
from sqft.stages.compress import (
    Compress,
    assign_weight,
    chosen_layers,
    do_nothing,
    guarded,
    output_error,
    run_calibration,
)
from sqft.stages.inputs import Report, StageInputs
from sqft.stages.step_parts import StepParts, reload_floats
from sqft.types import LinearStats, Pattern


class SparsifyStage:
    """The stage `sparsify`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs, self.section = inputs, inputs.section(Sparsify)
        self.scorer, self.label = inputs.step.component(Scorer), inputs.step.label(Scorer)
        self.updater = inputs.step.component(Updater) if Updater.kind in inputs.step.components else None
        self.updates_weights = self.updater is not None or type(self.scorer).prune is not Scorer.prune
        # The digest of every tensor, as it was loaded or as a component gave it: it is to be read back.
        self.tensors: dict[str, str] = {}
        self.others: dict[Path, OtherModel] = {}

    @cached_property
    def parts(self) -> StepParts:
        """The recipe's model, opened once."""
        return StepParts(self.inputs, self.inputs.plan.model_spec, reload_floats)

    def run(self) -> Report:
        """Write `model/` (the sparse model) and `masks.safetensors` (bit-packed, true where kept).

        Of several processes the first one prunes, and each of them runs its share of the calibration text.
        """
        parts, source = self.parts, self.inputs.plan.model_spec
        layers = chosen_layers(parts.opened.model, self.inputs.step)
        if not self.inputs.processes.is_main:
            return self._take_part(layers)
        for part in () if parts.streamed else parts.opened.parts:
            self._begin(part)
        allocation = self._allocation(layers)
        pruned: dict[str, dict[str, Any]] = {}
        masks: dict[str, Tensor] = {}

        def prune(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            mask, errors = self._prune(name, linear, stats, allocation[name])
            masks[name] = pack_mask(mask).cpu()
            pruned[name] = {
                "sparsity": 1 - mask.float().mean().item(),
                "errors": errors,
                "tokens": 0 if stats.unreached else stats.tokens,
                "zeros": int((linear.weight == 0).sum()),
                "weights": linear.weight.numel(),
                "mask": sha256(masks[name]),
            }

        def end(part: str) -> None:
            record: dict[str, Any] = {"tensors": {name: self.tensors[name] for name in parts.opened.tensors(part)}}
            record["layers"] = dict(pruned)
            parts.seal(part, record, lambda: float_tensors(parts.opened, part, source), {"masks": masks})
            pruned.clear()
            masks.clear()

        around = partial(parts.held, begin=self._begin, end=end)
        with around(OUTSIDE):
            pass
        total = self._calibrate(layers, prune, around)
        if parts.streamed:
            parts.writer.write_index()
            save_settings(parts.opened.model, parts.tokenizer, parts.writer.folder, source)
        else:
            save_model(parts.opened.model, parts.tokenizer, parts.writer.folder, source)
        parts.write_beside(["masks"])
        known = parts.all("layers")
        return self._report({name: known[name] for name in layers}, total)

    def _take_part(self, layers: Mapping[str, nn.Linear]) -> Report:
        """Run this process's share of the calibration text; the first one prunes the layers, and has the report."""
        if (allocator := self.inputs.step.component(Allocator)).needs:
            self._walk_dense(allocator, layers, do_nothing)
        self._calibrate(layers, do_nothing, self.parts.seen)
        return {}

    def _calibrate(self, layers: Mapping[str, nn.Linear], prune: Compress, around: Hold) -> int:
        """Call `prune` on each layer with its statistics; return the number of calibration tokens."""
        parts, needs = self.parts, self.scorer.needs | (self.updater.needs if self.updater else frozenset())
        # What comes late in a block makes up for what became of the layers before it, too.
        updates = self.updater is not None
        return run_calibration(
            self.inputs, parts.opened, parts.tokenizer, layers, needs, prune, "pruning", updates, around, parts.records
        )

    def _report(self, layers: Mapping[str, Mapping[str, Any]], tokens: int) -> Report:
        """Return the numbers to report.

        Args:
            layers: what is known of each pruned layer.
            tokens: of calibration.
        """
        weights, zeros = (sum(layer[count] for layer in layers.values()) for count in ("weights", "zeros"))
        errors = {name: layer["errors"] for name, layer in layers.items()}
        return {
            "sparsity": zeros / weights,
            "zeros": zeros,
            "weights": weights,
            "parameters": self.parts.opened.model.num_parameters(),
            "layers": {name: layer["sparsity"] for name, layer in layers.items()},
            "output_error": _means(errors),
            "output_errors": {name: of_layer for name, of_layer in errors.items() if of_layer},
            "calibration_tokens": tokens,
            "expert_tokens": {name: layer["tokens"] for name, layer in layers.items() if layer["tokens"] != tokens},
        }

    def _begin(self, part: str) -> None:
        """Remember the tensors of a part as they were loaded."""
        for name, tensor in self.parts.opened.tensors(part).items():
            if name not in self.tensors:
                self.tensors[name] = sha256(tensor)

    def verify(self) -> None:
        """Check that the model as stored opens, and that every tensor is as it was loaded, bit for bit: in pruned
        layers with the mask applied, or as the component that updates weights gave it. What a mask prunes is zero."""
        stored, _ = open_in_parts(self.inputs.plan.spec(self.inputs.scratch / "model"), self.inputs.step.streamed)
        masks = FolderReader(self.inputs.scratch, [self.inputs.scratch / "masks.safetensors"])
        expected = self.parts.all("tensors")
        known = {name: layer["mask"] for name, layer in self.parts.all("layers").items()}
        if {name: sha256(mask) for name, mask in masks.tensors()} != known:
            raise ArtifactError(f"sparsify ({self.label}): the masks as stored are not what the scorer gave")
        seen = set[str]()
        for part in stored.parts:
            with stored.held(part):
                for name, tensor in stored.tensors(part).items():
                    layer = name.removesuffix(".weight")
                    self._check(name, tensor, expected.get(name), masks.tensor(layer) if layer in known else None)
                    seen.add(name)
        for name in expected.keys() - seen:
            raise ArtifactError(f"sparsify ({self.label}): {name} is not stored")

    def _check(self, name: str, tensor: Tensor, expected: str | None, mask: Tensor | None) -> None:
        """Check a tensor as stored.

        Args:
            name: its name.
            tensor: as it was read back.
            expected: its digest; None where it was not there before.
            mask: bit-packed, of the weight of a layer that was pruned.
        """
        if sha256(tensor) != expected:
            updated, giver = mask is not None and self.updates_weights, "updater" if self.updater else "scorer"
            what = f"what the {giver} gave" if updated else "the original under its mask"
            raise ArtifactError(f"sparsify ({self.label}): {name} as stored is not {what}")
        if mask is not None and (tensor[~unpack_mask(mask, (tensor.shape[0], tensor.shape[1]))] != 0).any():
            raise ArtifactError(f"sparsify ({self.label}): pruned entries of {name} as stored are not zero")

    def _prune(
        self, name: str, linear: nn.Linear, stats: LinearStats, sparsity: float
    ) -> tuple[Tensor, dict[str, float]]:
        """Prune one layer in place; return its mask [out, in], and the relative errors of its output where they are
        known: of the loaded weight under the mask ("masked"), and of what it became ("updated").

        Raises:
            ContractError: when its weight is not what was loaded: a component edited it out of turn.
        """
        if sha256(linear.weight) != self.tensors[f"{name}.weight"]:
            raise ContractError(f"{name} changed before it was pruned: {self.label}, or the allocator, edited it")
        select = Selection(self.label, name, linear.weight, self.section.pattern, sparsity)
        readable = replace(stats, weight_in=partial(self._weight_in, layer=name))
        with guarded(self.label, {name: (linear, readable)}, partial(self.inputs.seed_for, "sparsify")) as given:
            weight, seeded = given[0][name], given[1][name]
            pruned = self.scorer.prune(weight, seeded, select)
        value, mask = checks.check_pruned(self.label, name, weight, pruned, select.pruned_fraction())
        if self.updater:
            value = self._update(self.updater, name, linear, stats, mask)
        errors = {}
        if stats.hessian is not None:
            errors["masked"] = output_error(weight, weight.masked_fill(~mask, 0), stats.hessian)
            if self.updates_weights:
                errors["updated"] = output_error(weight, value.float(), stats.hessian)
        # The kept weights of a scorer that only scores are the loaded ones; otherwise they are what a component gave.
        digest = "" if self.updates_weights else sha256(linear.weight.detach().masked_fill(~mask, 0))
        assign_weight(self.inputs.step.label(Updater) if self.updater else self.label, name, linear, value)
        self.tensors[f"{name}.weight"] = digest or sha256(linear.weight)
        return mask, errors

    def _weight_in(self, folder: Path, layer: str) -> Tensor:
        """Return the weight [out, in] of a layer in another model's folder; see `LinearStats.weight_in`."""
        if folder not in self.others:
            self.others[folder] = OtherModel(folder, self.inputs.plan.recipe.model.trust_remote_code)
        return self.others[folder].weight(layer)

    def _update(self, updater: Updater, name: str, linear: nn.Linear, stats: LinearStats, mask: Tensor) -> Tensor:
        """Return the weight [out, in] that the updater gives a layer, which is dense as yet, under the scorer's mask.

        Args:
            updater: the component.
            name: the layer's name.
            linear: the layer.
            stats: its statistics.
            mask: bool [out, in], true where kept.
        """
        label, before = self.inputs.step.label(Updater), mask.clone()
        with guarded(label, {name: (linear, stats)}, partial(self.inputs.seed_for, "update")) as given:
            value = updater.update(given[0][name], mask, given[1][name])
        checks.check_unchanged(label, name, before, mask, "the mask")
        return checks.check_updated(label, name, mask, value)

    def _allocation(self, layers: Mapping[str, nn.Linear]) -> Mapping[str, float]:
        """Return each layer's sparsity, as the allocator has it."""
        allocator, label = self.inputs.step.component(Allocator), self.inputs.step.label(Allocator)
        shapes = tuple(shape_of(name, linear) for name, linear in layers.items())
        measured = self._measured(allocator, label, layers) if allocator.needs else {}
        allocation = allocator.allocate(shapes, self.section.sparsity, measured)
        checks.check_allocation(label, shapes, self.section.sparsity, allocation)
        return allocation

    def _measured(self, allocator: Allocator, label: str, layers: Mapping[str, nn.Linear]) -> dict[str, float]:
        """Return what the allocator measures of the dense layers, block by block.

        Args:
            allocator: measures the layers of one block at a time.
            label: the allocator, as messages name it.
            layers: the linear layers to prune, by name.
        """
        measured: dict[str, float] = {}
        blocks = {
            block: [n for n in layers if self.parts.opened.part_of(n) == block] for block in self.parts.opened.blocks
        }
        of_block = {name: names for names in blocks.values() for name in names}
        waiting: dict[str, tuple[nn.Linear, LinearStats]] = {}

        def collect(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            """Measure a block once its last layer has come; its statistics are not kept."""
            waiting[name] = linear, stats
            if len(waiting) < len(of_block[name]):
                return
            with guarded(label, waiting, partial(self.inputs.seed_for, "measure")) as (weights, seeded):
                numbers = allocator.measure(weights, seeded)
            checks.check_measured(label, of_block[name], numbers)
            measured.update(numbers)
            waiting.clear()

        self._walk_dense(allocator, layers, collect)
        return measured

    def _walk_dense(self, allocator: Allocator, layers: Mapping[str, nn.Linear], collect: Compress) -> None:
        """Call `collect` on each layer of the dense model with what the allocator needs."""
        opened, tokenizer = self.parts.opened, self.parts.tokenizer
        run_calibration(self.inputs, opened, tokenizer, layers, allocator.needs, collect, "measuring")


def _means(errors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return the mean over the layers of each of their errors."""
    kinds = next(iter(errors.values()), {})
    return {kind: sum(one[kind] for one in errors.values()) / len(errors) for kind in kinds}


class Selection:
    """`sqft.types.Select` of one layer, which remembers how much of it went."""

    def __init__(self, label: str, name: str, weight: Tensor, pattern: Pattern, sparsity: float) -> None:
        self.label, self.name, self.weight, self.pattern, self.sparsity = label, name, weight, pattern, sparsity
        self.pruned = self.columns = self.widest = 0

    def __call__(self, scores: Tensor) -> Tensor:
        checks.check_scores(self.label, self.name, self.weight, scores)
        if self.pattern.of and scores.shape[1] % self.pattern.of:
            raise StageError(
                f"sparsify.pattern: the scorer chooses among {scores.shape[1]} inputs at a time, no multiple of the M "
                f"of '{self.pattern}'; change its block, or the pattern"
            )
        mask = keep_mask(scores, self.sparsity, self.pattern)
        self.pruned, self.columns = self.pruned + int((~mask).sum()), self.columns + scores.shape[1]
        self.widest = max(self.widest, scores.shape[1])
        return mask

    def pruned_fraction(self) -> float:
        """Return the fraction of the entries asked about that went.

        Raises:
            ContractError: when it was not asked about all columns.
            StageError: when it was asked about so few at a time that the fraction, in entries, misses the sparsity.
        """
        out, inputs = self.weight.shape
        if self.columns < inputs:
            raise ContractError(
                f"{self.label} returned scores of shape {[out, self.columns]} for {self.name}, expected {[out, inputs]}"
            )
        fraction = self.pruned / (out * self.columns)
        if self.widest < inputs and not self.pattern.of and abs(fraction - self.sparsity) > 0.02:
            raise StageError(
                f"sparsify.scorer: {self.label} chooses among so few inputs of {self.name} at a time that "
                f"{fraction:.3f} of them go where {self.sparsity:.3f} was asked for; give it a larger block"
            )
        return fraction
