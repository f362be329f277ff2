"""Train elastic low-rank deltas with transformers' Trainer (paper §2.2 to §2.4)."""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainerState

from sqft.components import checks
from sqft.components.kinds import Adapter, Merger
from sqft.data.collators import Collator, PackingCollator, pack
from sqft.data.encoding import Encoded, Example, Tokenization
from sqft.data.records import Record
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.kernels.checksums import bit_sum
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.effective_weight import combine_rows
from sqft.modeling.adapters.saving import store_deltas
from sqft.modeling.architecture.experts import Expert
from sqft.modeling.compat import compute_activations_again
from sqft.modeling.loading import load_tokenizer
from sqft.modeling.training.checkpoints import CheckpointSealer, newest_complete, resume
from sqft.modeling.training.loss import CompletionLoss, Distillation, sees_across
from sqft.modeling.training.teacher import Predictions, TaughtCollator, Teacher
from sqft.modeling.training.trainer import (
    Collate,
    DeltaTrainer,
    EarlyStopping,
    RankShardCollator,
    StopOnNonFiniteLoss,
    first_drawn,
)
from sqft.recipe.sections import Finetune
from sqft.stages.adapted import LOG, build_adapted_model, load_deltas
from sqft.stages.inputs import Report, StageInputs
from sqft.stages.training_arguments import training_arguments
from sqft.utils.files import CHECKPOINTS
from sqft.utils.progress import Track

log = logging.getLogger("sqft")

AVERAGED_STEPS = 10
"""Optimizer steps at the end of training whose mean loss is reported."""


class FinetuneStage:
    """The stage `finetune`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs, self.section = inputs, inputs.section(Finetune)
        self.adapter, self.merger = inputs.step.component(Adapter), inputs.step.component(Merger)
        self.adapter_label, self.merger_label = inputs.step.label(Adapter), inputs.step.label(Merger)

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The base with its adapters: opened once, to train them and to read back what was stored."""
        inputs = self.inputs
        return build_adapted_model(inputs.plan, inputs.folders, inputs.seed_for("adapter"), inputs.device)

    def run(self) -> Report:
        """Write `deltas.safetensors` (what trained), `space.json` and `log.jsonl` (a line for each optimizer step)."""
        section, data = self.section, self.inputs.data
        sets = {role: training for role, (training, _) in data.training_sets().items()}
        records = [record for training in sets.values() for record in training]
        predictions = self._predictions(records) if section.teacher else None  # first: one model at a time in memory
        adapted, training = self.adapted, self._encode("data", records)
        for role in unlearnt(sets, training.sizes):
            log.warning("finetune.%s: nothing of this data set is learnt: all of its examples are too long", role)
        validation = None
        if section.validation:
            validation = self._encode("validation", data.records("validation", section.validation)).examples
        if any(layer.dropout.p > 0 for layer in adapted.mergeable.values()):
            log.warning("dropout on the adapter's input trains through two paths, at about twice the cost")
        if section.gradient_checkpointing:
            compute_activations_again(adapted.model)
        check_first_combine(adapted, self.merger, self.merger_label)
        rows, collator = self._rows(training.examples)
        distillation = Distillation(section.teacher.weight, section.teacher.temperature) if section.teacher else None
        model = CompletionLoss(adapted.model, section.loss_chunk, distillation)
        if section.loss_chunk:
            model.check_head(torch.tensor([training.examples[0].input_ids[:64]], device=adapted.model.device))
        frozen = _checksums(adapted)
        progress = Progress(self.inputs.track)
        with self.inputs.processes.process_group(self.inputs.device):
            # The trainer is freed inside. After the group is gone, its DDP wrapper would hold Python's lock while it
            # waits for a thread of the group that needs that lock.
            collate = TaughtCollator(collator, predictions) if predictions else collator
            newest, state, best = self._train(model, rows, collate, validation, progress)
        after = _checksums(adapted)
        if changed := [name for name in frozen if after[name] != frozen[name]]:
            raise ContractError(f"{self.merger_label} edited the frozen weight of {changed[0]} in place while training")
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        validation_losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if self.inputs.processes.is_main:
            store_deltas(adapted, self.inputs.scratch)
            _write_log(state, best.step if best.restores else math.inf, self.inputs.scratch / LOG)
        divergences = [entry["kl"] for entry in state.log_history if "kl" in entry]
        return {
            "trainable": adapted.trainable,
            "steps": state.global_step,
            "examples": len(training.examples),
            "answers": training.answers,
            "ends": training.ends.total(),
            "rows": len(rows),
            "truncated": training.truncated,
            "tokens_cut": training.tokens_cut,
            "dropped": training.dropped,
            "loss_first": losses[0],
            "loss_last": _last(losses),
            **({"kl_first": divergences[0], "kl_last": _last(divergences)} if divergences else {}),
            **({"teacher_forwards": len(predictions.places)} if predictions else {}),
            "step_seconds": statistics.median(progress.seconds) if progress.seconds else None,
            "resumed_from": newest.name if newest else None,
            **({"validation_losses": validation_losses, "best_step": best.step} if validation_losses else {}),
        }

    def verify(self) -> None:
        """Check that the stored deltas read back complete and finite, that every layer trained, and that the effective
        weights keep the zeros that the merger promises to keep."""
        adapted = self.adapted
        adapted.model.to("cpu")  # where the merge is made
        load_deltas(adapted, self.inputs.scratch, self.adapter_label)
        idle = []
        for name, layer in adapted.layers.items():
            layer.rank = layer.delta.rank  # the last optimizer step may have trained a smaller one
            B, A, scale = layer.delta.factors(layer.rank)
            if any((scale * (B[rows].float() @ A.float())).any() for rows in layer.base.rows()):
                continue
            if isinstance(adapted.model.get_submodule(name.rpartition(".")[0]), Expert):
                idle.append(name)  # no example was routed to it
            else:
                raise ArtifactError(f"finetune ({self.adapter_label}): {name} did not train: its delta is still zero")
        for name, merged in adapted.mergeable.items():
            effective, base = merged.effective(), merged.base
            for rows in base.rows():  # a float32 copy of all of it would be the run's peak of memory
                part = effective[rows]
                checks.check_effective(self.merger_label, name, base.block(rows), part, self.merger.keeps_mask)
        if idle:
            log.warning(
                "%d layers of experts did not train, such as %s: no example was routed to them", len(idle), idle[0]
            )

    def _encode(self, role: str, records: list[Record]) -> Encoded:
        """Encode the records of a data set, and warn when some examples were truncated, or left out."""
        encoded, length = self._tokenization(self.adapted.tokenizer).encode(records), self.section.max_length
        of = len(encoded.examples) + encoded.dropped
        if encoded.truncated:
            log.warning("finetune.%s: %d of %d examples were cut to %d tokens", role, encoded.truncated, of, length)
        if encoded.dropped:
            log.warning(
                'finetune.%s: %d of %d examples were left out: of more than %d tokens, truncation "%s" leaves nothing '
                "to learn",
                role, encoded.dropped, of, length, self.section.truncation,
            )  # fmt: skip
        if note := encoded.note():
            log.info("finetune.%s: %s", role, note)
        if warning := encoded.warning():
            log.warning("finetune.%s: %s", role, warning)
        for end in unknown_ends(self.adapted.model, self.adapted.tokenizer, encoded.ends):
            log.warning(
                "finetune.%s: answers end in %s, which generation_config.json does not name in eos_token_id: name it "
                "there, or the model goes on where it is served",
                role, end,
            )  # fmt: skip
        return encoded

    def _tokenization(self, tokenizer: PreTrainedTokenizerBase) -> Tokenization:
        section = self.section
        return Tokenization(tokenizer, section.max_length, section.loss_on, section.truncation)

    def _predictions(self, records: list[Record]) -> Predictions:
        """Let the teacher read what training will draw, and free it.

        Raises:
            SqftError: when the teacher cannot be used.
        """
        inputs, section, taught = self.inputs, self.section, self.section.teacher
        spec, plan = inputs.plan.teacher, inputs.plan
        assert taught and spec
        tokenizer = load_tokenizer(plan.spec(plan.adapter_base.model(inputs.folders)))
        examples = self._tokenization(tokenizer).encode(records).examples
        rows: list[list[Example]] = pack(examples, section.max_length) if section.packing else [[e] for e in examples]
        # One batch more than the steps take: it is made before the last step ends.
        batches = section.steps * section.gradient_accumulation + 1 if section.steps else len(rows)
        drawn = first_drawn(len(rows), batches * section.batch_size, inputs.data.seed)
        teacher = Teacher(
            spec,
            taught.temperature,
            taught.top_k,
            plan.source.size("vocab_size", default=len(tokenizer)),
            section.batch_size,
            section.loss_chunk,
            section.precision,
            inputs.device,
        )
        folder = inputs.scratch / CHECKPOINTS / "teacher"  # deleted with the checkpoints
        read = [example for row in drawn for example in rows[row]]
        with inputs.data.reading("teacher.model") if "teacher.model" in inputs.step.files else nullcontext():
            return teacher.predictions(read, folder, inputs.processes, inputs.track)

    def _rows(self, examples: list[Example]) -> tuple[Sequence[Any], Collator | PackingCollator]:
        """Return what Trainer draws batches from, and what makes a batch of them.

        Raises:
            StageError: when examples are to be packed, and the model would let one attend to another.
        """
        model, pad = self.adapted.model, self.adapted.tokenizer.pad_token_id
        if not self.section.packing:
            return examples, Collator(pad)
        if sees_across(model):
            kind = type(model).__name__
            raise StageError(f"finetune.packing: examples in one row of {kind} would see one another; set it to false")
        rows = pack(examples, self.section.max_length)
        log.info("%d examples in %d rows of %d tokens", len(examples), len(rows), self.section.max_length)
        return rows, PackingCollator(pad)

    def _train(
        self,
        model: CompletionLoss,
        rows: Sequence[Any],
        collator: Collate,
        validation: list[Example] | None,
        progress: Progress,
    ) -> tuple[Path | None, TrainerState, EarlyStopping]:
        """Train, from the newest complete checkpoint if there is one.

        Args:
            model: the adapted model with its loss.
            rows: what batches are drawn from.
            collator: what makes a batch of some rows.
            validation: examples whose loss is measured now and then; None for no validation.
            progress: the display.

        Returns:
            The checkpoint that training went on from, Trainer's state at the end, and the best validation.
        """
        adapted, section, processes, scratch = self.adapted, self.section, self.inputs.processes, self.inputs.scratch
        best = EarlyStopping(model, section.patience, processes)
        sampler = RankSampler(adapted, self.adapter, self.adapter_label, self.inputs.seed_for)
        logs = self.inputs.plan.recipe.resolve(section.logging_dir) if section.logging_dir else scratch / "logs"
        trainer = DeltaTrainer(
            adapted,
            processes,
            logs,
            section.learning_rate_ratio,
            model=model,
            args=training_arguments(section, scratch / CHECKPOINTS, self.inputs.data.seed, self.inputs.device),
            train_dataset=rows,
            eval_dataset=validation,
            data_collator=RankShardCollator(collator, processes),
            callbacks=[sampler, progress, StopOnNonFiniteLoss(), best, CheckpointSealer(processes)],
        )
        newest = newest_complete(scratch / CHECKPOINTS, processes)
        state = resume(trainer, best, newest)
        best.restore()
        return newest, state, best


def check_first_combine(adapted: AdaptedModel, merger: Merger, label: str) -> None:
    """Check a merger's result on a part of one layer before training; checking every forward would cost the speed.

    Raises:
        StageError: when a layer keeps none of its weights, so that nothing there can train.
        ContractError: when the merger breaks its contract.
    """
    if not adapted.mergeable:
        return
    for name, layer in adapted.mergeable.items():
        masks = (layer.base.block(rows).mask for rows in layer.base.rows())
        if merger.keeps_mask and not any(mask is None or mask.any() for mask in masks):
            raise StageError(
                f"finetune.targets: {name} keeps none of its weights, so nothing there can train; "
                "prune less, or leave it out of the targets"
            )
    name, layer = next(iter(adapted.mergeable.items()))
    rows = next(layer.base.rows())
    base = layer.base.block(rows)
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(base.weight.shape, generator=generator).to(base.weight.device) * base.weight.std()
    kept = base.weight.clone(), delta.clone()
    block = combine_rows(merger, layer.base, rows, delta)
    derivative = merger.derivative(block.base, delta, torch.ones_like(delta))
    checks.check_unchanged(label, name, kept[0], block.base.weight)
    checks.check_unchanged(label, name, kept[1], delta, "the delta")
    checks.check_effective(label, name, block.base, block.merged, merger.keeps_mask)
    checks.check_derivative(label, name, block.base, derivative)


def unlearnt(sets: Mapping[str, Sequence[Record]], sizes: Sequence[int]) -> list[str]:
    """Return the roles of data sets of which no example is left.

    Args:
        sets: the records of each.
        sizes: how many examples each record gave, in the order of the sets.
    """
    left = iter(sizes)
    counts = {role: sum(islice(left, len(records))) for role, records in sets.items()}
    return [role for role, records in sets.items() if records and not counts[role]]


def unknown_ends(model: PreTrainedModel, tokenizer: Any, ends: Iterable[int]) -> list[str]:
    """Return those of the tokens `ends` at which generation does not stop by itself."""
    config = model.generation_config
    known = config.eos_token_id if config is not None else None
    stops = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])}
    return [tokenizer.decode([end]) for end in sorted(set(ends) - stops)]


def _checksums(adapted: AdaptedModel) -> dict[str, int]:
    """Sum the bits of each adapted layer's frozen weight: an edit in place changes the sum."""
    return {name: sum(map(bit_sum, layer.base.state_dict().values())) for name, layer in adapted.layers.items()}


def _last(values: list[float]) -> float:
    """Return the mean of a value in the last optimizer steps."""
    return statistics.fmean(values[-AVERAGED_STEPS:])


def _write_log(state: TrainerState, last: float, path: Path) -> None:
    """Write the losses of training and of validation, a JSON object a line.

    Args:
        state: has what was logged.
        last: the last step of which the deltas are the result; later ones are written as `discarded`.
        path: the file.
    """
    with path.open("w") as stream:
        for entry in state.log_history:
            if entry.keys() & {"loss", "eval_loss"}:
                after = {"discarded": True} if entry["step"] > last else {}
                stream.write(json.dumps(entry | after, sort_keys=True) + "\n")


class RankSampler(TrainerCallback):
    """Sets, and logs, the rank configuration of each optimizer step: a pure function of the seed and the global step.

    Nothing is drawn inside a forward, so gradient checkpointing recomputes with the same ranks, and a resumed run
    trains the ranks that an uninterrupted one would have.
    """

    def __init__(self, adapted: AdaptedModel, adapter: Adapter, label: str, seed_for: Callable[..., int]) -> None:
        self.adapted, self.adapter, self.label, self.seed_for = adapted, adapter, label, seed_for

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.config = self.adapter.sample(self.adapted.space, Random(self.seed_for("ranks", state.global_step)))
        checks.check_choice(self.label, self.adapted.space, self.config)
        self.adapted.set_ranks(self.config)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if "loss" in state.log_history[-1]:  # trackers get `kwargs["logs"]`, and take only numbers
            state.log_history[-1]["ranks"] = list(self.config.ranks)


class Progress(TrainerCallback):
    """Shows Trainer's steps on sqft's own display, and measures the seconds of each."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.bar: Any = None
        self.seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        self.bar = self.track(range(left), "fine-tuning", left)
        next(self.bar, None)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self.start)
        next(self.bar, None)
