"""Train elastic low-rank deltas with transformers' Trainer (paper §2.2 to §2.4)."""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import TrainerCallback, TrainerState

from sqft.components import checks
from sqft.components.kinds import Adapter, Merger
from sqft.data.collators import Collator, PackingCollator, pack
from sqft.data.encoding import Encoded, Example, Tokenization
from sqft.data.records import Record
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.statistics import bit_sum
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.frozen_weight import FrozenWeight
from sqft.modeling.adapters.saving import store_deltas
from sqft.modeling.architecture.linears import Expert
from sqft.modeling.training.checkpoints import CheckpointSealer, newest_complete, resume
from sqft.modeling.training.loss import CompletionLoss, sees_across
from sqft.modeling.training.trainer import DeltaTrainer, EarlyStopping, RankShardCollator, StopOnNonFiniteLoss
from sqft.recipe.sections import Finetune
from sqft.stages.adapted import build_adapted_model, load_adapted_model
from sqft.stages.inputs import Report, StageInputs
from sqft.stages.training_arguments import arguments
from sqft.utils.files import CHECKPOINTS

log = logging.getLogger("sqft")


class FinetuneStage:
    """The stage `finetune`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> Report:
        return _run(self.inputs)

    def verify(self) -> None:
        _verify(self.inputs)


def _run(inputs: StageInputs) -> Report:
    """Write `deltas.safetensors` (what trained), `space.json` and `log.jsonl` (one line a step)."""
    section = inputs.section(Finetune)
    tuned = build_adapted_model(inputs.plan, inputs.folders, inputs.seed_for("adapter"), inputs.device)
    encoded = _encode(inputs, tuned, "data", inputs.data.training_records()[0])
    held = inputs.data.records("validation", section.validation) if section.validation else []
    validation = _encode(inputs, tuned, "validation", held).examples if held else None
    layer = next(iter(tuned.adapted.values()))
    if layer.merger.merges and layer.dropout.p > 0:
        log.warning("dropout on the adapter's input trains through two paths, at about twice the cost")
    if section.gradient_checkpointing:
        tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    _check_first_combine(inputs, tuned)
    rows, collator = _rows(inputs, tuned, encoded.examples)
    model = CompletionLoss(tuned.model, section.loss_chunk)
    if section.loss_chunk:
        model.check_head(torch.tensor([encoded.examples[0].input_ids[:64]], device=tuned.model.device))
    progress = _Progress(inputs)
    frozen = {name: _checksum(layer.base) for name, layer in tuned.adapted.items()}
    with inputs.processes.process_group(inputs.device):
        newest, state, best = _train(inputs, tuned, model, rows, collator, validation, progress)
    for name, layer in tuned.adapted.items():
        if _checksum(layer.base) != frozen[name]:
            raise ContractError(f"{inputs.label(Merger)} edited the frozen weight of {name} in place while training")
    losses = [entry for entry in state.log_history if "loss" in entry]
    looks = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    if inputs.processes.is_main:
        store_deltas(tuned, inputs.scratch)
        with (inputs.scratch / "log.jsonl").open("w") as stream:
            told = [entry for entry in state.log_history if entry.keys() & {"loss", "eval_loss"}]
            stream.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in told)
    tail = losses[-10:]
    return {
        "trainable": tuned.trainable,
        "steps": state.global_step,
        "examples": len(encoded.examples),
        "rows": len(rows),
        "truncated": encoded.truncated,
        "tokens_cut": encoded.tokens_cut,
        "loss_first": losses[0]["loss"],
        "loss_last": sum(entry["loss"] for entry in tail) / len(tail),
        "step_seconds": statistics.median(progress.times) if progress.times else None,
        "resumed_from": newest.name if newest else None,
        **({"validation_losses": looks, "best_step": best.step} if looks else {}),
    }


def _verify(inputs: StageInputs) -> None:
    """What was stored reads back whole and finite, trained at all, and keeps every zero it promised to."""
    tuned = load_adapted_model(inputs.plan, inputs.folders, inputs.scratch, "cpu")
    merger, label, idle = inputs.component(Merger), inputs.label(Merger), []
    for name, layer in tuned.adapted.items():
        B, A, scale = layer.delta.factors(layer.rank)
        delta = scale * (B.float() @ A.float())
        if not delta.any() and isinstance(tuned.model.get_submodule(name.rpartition(".")[0]), Expert):
            idle.append(name)  # no example was routed to it
        elif not delta.any():
            raise ArtifactError(f"finetune ({inputs.label(Adapter)}): {name} did not train: its delta is still zero")
        if merger.merges:
            checks.check_effective(label, name, layer.base.block(), layer.effective(), merger.keeps_mask)
    if idle:
        log.warning("%d layers of experts did not train, such as %s: no example was routed to them", len(idle), idle[0])


def _encode(inputs: StageInputs, tuned: AdaptedModel, name: str, records: list[Record]) -> Encoded:
    """Records as tokens."""
    section = inputs.section(Finetune)
    encoded = Tokenization(tuned.tokenizer, section.max_length, section.loss_on).encode(records)
    if encoded.truncated:
        log.warning(
            "finetune.%s: %d of %d examples were cut to %d tokens",
            name, encoded.truncated, len(records), section.max_length,
        )  # fmt: skip
    return encoded


def _rows(
    inputs: StageInputs, tuned: AdaptedModel, examples: list[Example]
) -> tuple[Sequence[Any], Collator | PackingCollator]:
    """What Trainer draws from, and how a batch is made of it.

    Raises:
        StageError: when examples are to be packed, and the model would let one see another.
    """
    section, pad = inputs.section(Finetune), tuned.tokenizer.pad_token_id
    if not section.packing:
        return examples, Collator(pad)
    if sees_across(tuned.model):
        kind = type(tuned.model).__name__
        raise StageError(f"finetune.packing: examples in one row of {kind} would see one another; set it to false")
    rows = pack(examples, section.max_length)
    log.info("%d examples in %d rows of %d tokens", len(examples), len(rows), section.max_length)
    return rows, PackingCollator(pad)


def _train(
    inputs: StageInputs,
    tuned: AdaptedModel,
    model: CompletionLoss,
    rows: Sequence[Any],
    collator: Collator | PackingCollator,
    validation: list[Example] | None,
    progress: _Progress,
) -> tuple[Path | None, TrainerState, EarlyStopping]:
    """The checkpoint that training went on from, if there was one, what Trainer knows at its end, and the best look."""
    section, processes = inputs.section(Finetune), inputs.processes
    checkpoints = inputs.scratch / CHECKPOINTS
    best = EarlyStopping(model, section.patience, processes)
    logs = inputs.plan.recipe.resolve(section.logging_dir) if section.logging_dir else inputs.scratch / "logs"
    trainer = DeltaTrainer(
        tuned,
        processes,
        logs,
        model=model,
        args=arguments(section, checkpoints, inputs.data.seed, inputs.device),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=RankShardCollator(collator, processes),
        callbacks=[_RankSampler(inputs, tuned), progress, StopOnNonFiniteLoss(), best, CheckpointSealer(processes)],
    )
    newest = newest_complete(checkpoints, processes)
    state = resume(trainer, best, newest)
    best.restore()
    return newest, state, best


def _checksum(weight: FrozenWeight) -> int:
    """A sum over the bits of all that a frozen weight holds, which an edit in place does not leave alone."""
    return sum(map(bit_sum, weight.state_dict().values()))


def _check_first_combine(inputs: StageInputs, tuned: AdaptedModel) -> None:
    """The core's check of a merger's result, once before training: every forward would cost the speed."""
    merger = inputs.component(Merger)
    if not merger.merges:
        return
    for name, layer in tuned.adapted.items():
        mask = layer.base.block().mask
        if merger.keeps_mask and mask is not None and not mask.any():
            raise StageError(
                f"finetune.targets: {name} keeps none of its weights, so nothing there can train; "
                "prune less, or leave it out of the targets"
            )
    name, layer = next(iter(tuned.adapted.items()))
    base = layer.base.block()
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(base.weight.shape, generator=generator).to(base.weight.device) * base.weight.std()
    kept = base.weight.clone(), delta.clone()
    result = merger.combine(base, delta)
    derivative = merger.derivative(base, delta, torch.ones_like(delta))
    checks.check_unchanged(inputs.label(Merger), name, kept[0], base.weight)
    checks.check_unchanged(inputs.label(Merger), name, kept[1], delta, "the delta")
    checks.check_effective(inputs.label(Merger), name, base, result, merger.keeps_mask)
    checks.check_derivative(inputs.label(Merger), name, base, derivative)


class _RankSampler(TrainerCallback):
    """One configuration for each optimizer step: a pure function of the seed and the global step.

    Nothing is drawn inside a forward, so gradient checkpointing recomputes with the same ranks, and a
    resumed run trains the ranks that an uninterrupted one would have.
    """

    def __init__(self, inputs: StageInputs, tuned: AdaptedModel) -> None:
        self.inputs, self.tuned = inputs, tuned
        self.adapter, self.label = inputs.component(Adapter), inputs.label(Adapter)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rng = Random(self.inputs.seed_for("ranks", state.global_step))
        choice = self.adapter.sample(self.tuned.space, rng)
        checks.check_choice(self.label, self.tuned.space, choice)
        self.tuned.set_ranks(choice)


class _Progress(TrainerCallback):
    """Trainer's steps on sqft's own display, and how many seconds each took."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs
        self.bar: Any = None
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        self.bar = self.inputs.track(range(left), "fine-tuning", left)
        next(self.bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self.start)
        next(self.bar, None)
