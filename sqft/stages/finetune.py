"""Train elastic low-rank deltas with transformers' Trainer (paper §2.2 to §2.4)."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from pathlib import Path
from random import Random
from typing import Any, cast

import torch
from safetensors.torch import load_file
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments

from sqft import checks
from sqft.contracts import Adapter, Merger
from sqft.data.batches import Collator, PackingCollator, pack
from sqft.data.prompts import Example, encode_all
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.modeling.loss import CompletionLoss, sees_across
from sqft.modeling.tuning import Tuned, build, restore, store_deltas
from sqft.modeling.weights import FrozenWeight
from sqft.recipe import Finetune
from sqft.source import Digests
from sqft.stages.base import Context, log
from sqft.store import CHECKPOINTS, write_json

COMPLETE = "complete.json"
"""Written last into a checkpoint: the checksums of its files. A checkpoint without it does not count."""


def run(context: Context) -> dict[str, Any]:
    """Write `deltas.safetensors` (what trained), `space.json` and `log.jsonl` (one line a step)."""
    section = cast(Finetune, context.step.section)
    tuned = build(context.plan, context.base(), context.seed_for("adapter"), context.device)
    records, _ = context.training_records()
    encoded = encode_all(records, tuned.tokenizer, section.max_length, section.loss_on)
    if encoded.truncated:
        log.warning("%d of %d examples were cut to %d tokens", encoded.truncated, len(records), section.max_length)
    layer = next(iter(tuned.adapted.values()))
    if layer.merger.merges and layer.dropout.p > 0:
        log.warning("dropout on the adapter's input trains through two paths, at about twice the cost")
    if section.gradient_checkpointing:
        tuned.model.gradient_checkpointing_enable({"use_reentrant": False})
    _check_first_combine(context, tuned)
    rows, collator = _rows(context, tuned, encoded.examples)
    model = CompletionLoss(tuned.model)
    checkpoints = context.folder / CHECKPOINTS
    progress = _Progress(context)
    trainer = _Trainer(
        model=model,
        args=_arguments(context, section, checkpoints),
        train_dataset=rows,
        data_collator=collator,
        callbacks=[_RankSampler(context, tuned), progress, _FiniteLoss(), _Checkpoints()],
    )
    trainer.remove_callback(PrinterCallback)
    newest = _newest_complete(checkpoints)
    frozen = {name: _checksum(layer.base) for name, layer in tuned.adapted.items()}
    state = _resume(trainer, newest)
    for name, layer in tuned.adapted.items():
        if _checksum(layer.base) != frozen[name]:
            raise ContractError(f"{context.who(Merger)} edited the frozen weight of {name} in place while training")
    losses = [entry for entry in state.log_history if "loss" in entry]
    store_deltas(tuned, context.folder)
    with (context.folder / "log.jsonl").open("w") as stream:
        stream.writelines(json.dumps(entry, sort_keys=True) + "\n" for entry in losses)
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
    }


def prove(context: Context) -> None:
    """What was stored reads back whole and finite, trained at all, and keeps every zero it promised to."""
    tuned = restore(context.plan, context.base(), context.folder, "cpu")
    merger, who = context.component(Merger), context.who(Merger)
    for name, layer in tuned.adapted.items():
        B, A, scale = layer.delta.factors(layer.rank)
        delta = scale * (B.float() @ A.float())
        if not delta.any():
            raise ArtifactError(f"finetune ({context.who(Adapter)}): {name} did not train: its delta is still zero")
        if merger.merges:
            checks.check_effective(who, name, layer.base.block(), layer.effective(), merger.keeps_mask)


def _rows(context: Context, tuned: Tuned, examples: list[Example]) -> tuple[list[dict[str, Any]], Any]:
    """What Trainer draws from, and how a batch is made of it.

    Raises:
        StageError: when examples are to be packed, and the model would let one see another.
    """
    section, pad = cast(Finetune, context.step.section), tuned.tokenizer.pad_token_id
    if not section.packing:
        return [{"input_ids": e.input_ids, "labels": e.labels} for e in examples], Collator(pad)
    if sees_across(tuned.model):
        kind = type(tuned.model).__name__
        raise StageError(f"finetune.packing: examples in one row of {kind} would see one another; set it to false")
    rows = pack(examples, section.max_length)
    log.info("%d examples in %d rows of %d tokens", len(examples), len(rows), section.max_length)
    return [{"examples": row} for row in rows], PackingCollator(pad)


def _resume(trainer: Trainer, newest: Path | None) -> TrainerState:
    """Train from the newest checkpoint to the end; what Trainer then knows of the run.

    A checkpoint of the last step is only read: Trainer would take one step more from it.
    """
    if newest:
        log.info("resuming fine-tuning from %s", newest.name)
        state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
        if state.global_step >= state.max_steps:
            trainer.model.load_state_dict(load_file(newest / "model.safetensors"))
            return state
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    return trainer.state


def _checksum(weight: FrozenWeight) -> int:
    """A sum over the bits of all that a frozen weight holds, which an edit in place does not leave alone."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
    held = weight.state_dict().values()
    return sum(int(t.contiguous().view(bits[t.element_size()]).sum(dtype=torch.int64)) for t in held)


def _check_first_combine(context: Context, tuned: Tuned) -> None:
    """The core's check of a merger's result, once before training: every forward would cost the speed."""
    merger = context.component(Merger)
    if not merger.merges:
        return
    name, layer = next(iter(tuned.adapted.items()))
    base = layer.base.block()
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(base.weight.shape, generator=generator).to(base.weight.device) * base.weight.std()
    kept = base.weight.clone(), delta.clone()
    result = merger.combine(base, delta)
    derivative = merger.derivative(base, delta, torch.ones_like(delta))
    checks.check_unchanged(context.who(Merger), name, kept[0], base.weight)
    checks.check_unchanged(context.who(Merger), name, kept[1], delta, "the delta")
    checks.check_effective(context.who(Merger), name, base, result, merger.keeps_mask)
    checks.check_derivative(context.who(Merger), name, base, derivative)


def _arguments(context: Context, section: Finetune, checkpoints: Path) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=section.epochs,
        max_steps=section.steps or -1,
        per_device_train_batch_size=section.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup_steps,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        bf16=section.precision == "bfloat16",
        use_cpu=context.device == "cpu",
        seed=context.seed,
        data_seed=context.seed,
        optim="adamw_torch",
        remove_unused_columns=False,
        label_names=["labels"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        save_strategy="steps",
        save_steps=section.save_every,
        save_total_limit=2,  # the newest may be cut off while it is written; the one before it is whole
        dataloader_pin_memory=False,
    )


class _Trainer(Trainer):
    """Trainer, but scales do not decay: towards 0 they would leave the base's grid."""

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".gain")]


class _RankSampler(TrainerCallback):
    """One configuration for each optimizer step: a pure function of the seed and the global step.

    Nothing is drawn inside a forward, so gradient checkpointing recomputes with the same ranks, and a
    resumed run trains the ranks that an uninterrupted one would have.
    """

    def __init__(self, context: Context, tuned: Tuned) -> None:
        self.context, self.tuned = context, tuned
        self.adapter, self.who = context.component(Adapter), context.who(Adapter)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rng = Random(self.context.seed_for("ranks", state.global_step))
        choice = self.adapter.sample(self.tuned.space, rng)
        checks.check_choice(self.who, self.tuned.space, choice)
        self.tuned.choose(choice)


class _FiniteLoss(TrainerCallback):
    """Stop at the first loss that is not finite, before a checkpoint is made of it."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise StageError(
                f"the loss is not finite at step {state.global_step}; lower finetune.learning_rate or use float32"
            )


class _Checkpoints(TrainerCallback):
    """Seal each checkpoint once it is whole."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of settings that nothing reads
        _seal(folder)


class _Progress(TrainerCallback):
    """Trainer's steps on sqft's own display, and how many seconds each took."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.bar: Any = None
        self.times: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = state.max_steps - state.global_step
        self.bar = self.context.track(range(left), "fine-tuning", left)
        next(self.bar, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self.start)
        next(self.bar, None)


def _seal(folder: Path) -> None:
    digests = Digests()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    write_json(folder / COMPLETE, {f.name: digests.file(f) for f in sorted(folder.iterdir()) if f.name != COMPLETE})


def _newest_complete(checkpoints: Path) -> Path | None:
    """The newest checkpoint whose every file is as it was sealed; all others are deleted."""
    newest = None
    folders = [folder for folder in checkpoints.glob("checkpoint-*") if folder.is_dir()]
    for folder in sorted(folders, key=lambda f: int(f.name.rpartition("-")[2]), reverse=True):
        if newest is None and _is_complete(folder):
            newest = folder
        elif newest is None:
            log.warning("%s was cut off while it was written and is not used", folder.name)
            shutil.rmtree(folder)
    return newest


def _is_complete(folder: Path) -> bool:
    try:
        sealed: dict[str, str] = json.loads((folder / COMPLETE).read_text())
        digests = Digests()
        return all(digests.file(folder / name) == digest for name, digest in sealed.items())
    except (OSError, ValueError, AttributeError):
        return False
