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
from sqft.kernels.checksums import bit_sum
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.effective_weight import combine_rows
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
    adapted = build_adapted_model(inputs.plan, inputs.folders, inputs.seed_for("adapter"), inputs.device)
    encoded = _encode(inputs, adapted, "data", inputs.data.training_records()[0])
    held = inputs.data.records("validation", section.validation) if section.validation else []
    validation = _encode(inputs, adapted, "validation", held).examples if held else None
    if any(layer.dropout.p > 0 for layer in adapted.merged.values()):
        log.warning("dropout on the adapter's input trains through two paths, at about twice the cost")
    if section.gradient_checkpointing:
        adapted.model.gradient_checkpointing_enable({"use_reentrant": False})
    _check_first_combine(inputs, adapted)
    rows, collator = _rows(inputs, adapted, encoded.examples)
    model = CompletionLoss(adapted.model, section.loss_chunk)
    if section.loss_chunk:
        model.check_head(torch.tensor([encoded.examples[0].input_ids[:64]], device=adapted.model.device))
    progress = _Progress(inputs)
    frozen = {name: _checksum(layer.base) for name, layer in adapted.layers.items()}
    with inputs.processes.process_group(inputs.device):
        newest, state, best = _train(inputs, adapted, model, rows, collator, validation, progress)
    for name, layer in adapted.layers.items():
        if _checksum(layer.base) != frozen[name]:
            raise ContractError(f"{inputs.label(Merger)} edited the frozen weight of {name} in place while training")
    losses = [entry for entry in state.log_history if "loss" in entry]
    looks = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    if inputs.processes.is_main:
        store_deltas(adapted, inputs.scratch)
        with (inputs.scratch / "log.jsonl").open("w") as stream:
            told = [entry for entry in state.log_history if entry.keys() & {"loss", "eval_loss"}]
            stream.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in told)
    tail = losses[-10:]
    return {
        "trainable": adapted.trainable,
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
    adapted = load_adapted_model(inputs.plan, inputs.folders, inputs.scratch, "cpu")
    merger, label, idle = inputs.component(Merger), inputs.label(Merger), []
    for name, layer in adapted.layers.items():
        B, A, scale = layer.delta.factors(layer.rank)
        delta = scale * (B.float() @ A.float())
        if not delta.any() and isinstance(adapted.model.get_submodule(name.rpartition(".")[0]), Expert):
            idle.append(name)  # no example was routed to it
        elif not delta.any():
            raise ArtifactError(f"finetune ({inputs.label(Adapter)}): {name} did not train: its delta is still zero")
    for name, merged in adapted.merged.items():
        checks.check_effective(label, name, merged.base.block(), merged.effective(), merger.keeps_mask)
    if idle:
        log.warning("%d layers of experts did not train, such as %s: no example was routed to them", len(idle), idle[0])


def _encode(inputs: StageInputs, adapted: AdaptedModel, name: str, records: list[Record]) -> Encoded:
    """Records as tokens."""
    section = inputs.section(Finetune)
    encoded = Tokenization(adapted.tokenizer, section.max_length, section.loss_on).encode(records)
    if encoded.truncated:
        log.warning(
            "finetune.%s: %d of %d examples were cut to %d tokens",
            name, encoded.truncated, len(records), section.max_length,
        )  # fmt: skip
    return encoded


def _rows(
    inputs: StageInputs, adapted: AdaptedModel, examples: list[Example]
) -> tuple[Sequence[Any], Collator | PackingCollator]:
    """What Trainer draws from, and how a batch is made of it.

    Raises:
        StageError: when examples are to be packed, and the model would let one see another.
    """
    section, pad = inputs.section(Finetune), adapted.tokenizer.pad_token_id
    if not section.packing:
        return examples, Collator(pad)
    if sees_across(adapted.model):
        kind = type(adapted.model).__name__
        raise StageError(f"finetune.packing: examples in one row of {kind} would see one another; set it to false")
    rows = pack(examples, section.max_length)
    log.info("%d examples in %d rows of %d tokens", len(examples), len(rows), section.max_length)
    return rows, PackingCollator(pad)


def _train(
    inputs: StageInputs,
    adapted: AdaptedModel,
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
        adapted,
        processes,
        logs,
        model=model,
        args=arguments(section, checkpoints, inputs.data.seed, inputs.device),
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=RankShardCollator(collator, processes),
        callbacks=[_RankSampler(inputs, adapted), progress, StopOnNonFiniteLoss(), best, CheckpointSealer(processes)],
    )
    newest = newest_complete(checkpoints, processes)
    state = resume(trainer, best, newest)
    best.restore()
    return newest, state, best


def _checksum(weight: FrozenWeight) -> int:
    """A sum over the bits of all that a frozen weight holds, which an edit in place does not leave alone."""
    return sum(map(bit_sum, weight.state_dict().values()))


def _check_first_combine(inputs: StageInputs, adapted: AdaptedModel) -> None:
    """The core's check of a merger's result, once before training: every forward would cost the speed."""
    if not adapted.merged:
        return
    merger, label = inputs.component(Merger), inputs.label(Merger)
    for name, layer in adapted.merged.items():
        mask = layer.base.block().mask
        if merger.keeps_mask and mask is not None and not mask.any():
            raise StageError(
                f"finetune.targets: {name} keeps none of its weights, so nothing there can train; "
                "prune less, or leave it out of the targets"
            )
    name, layer = next(iter(adapted.merged.items()))
    base = layer.base.block()
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(base.weight.shape, generator=generator).to(base.weight.device) * base.weight.std()
    kept = base.weight.clone(), delta.clone()
    block = combine_rows(merger, layer.base, slice(None), delta)
    derivative = merger.derivative(block.base, delta, torch.ones_like(delta))
    checks.check_unchanged(label, name, kept[0], block.base.weight)
    checks.check_unchanged(label, name, kept[1], delta, "the delta")
    checks.check_effective(label, name, block.base, block.merged, merger.keeps_mask)
    checks.check_derivative(label, name, block.base, derivative)


class _RankSampler(TrainerCallback):
    """One configuration for each optimizer step: a pure function of the seed and the global step.

    Nothing is drawn inside a forward, so gradient checkpointing recomputes with the same ranks, and a
    resumed run trains the ranks that an uninterrupted one would have.
    """

    def __init__(self, inputs: StageInputs, adapted: AdaptedModel) -> None:
        self.inputs, self.adapted = inputs, adapted
        self.adapter, self.label = inputs.component(Adapter), inputs.label(Adapter)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rng = Random(self.inputs.seed_for("ranks", state.global_step))
        choice = self.adapter.sample(self.adapted.space, rng)
        checks.check_choice(self.label, self.adapted.space, choice)
        self.adapted.set_ranks(choice)


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
