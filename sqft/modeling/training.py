"""transformers' Trainer for deltas: its arguments, its batches in several processes, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from sqft.data.prompts import IGNORED
from sqft.errors import StageError
from sqft.processes import Processes
from sqft.recipe import Finetune

Collate = Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]]


def arguments(section: Finetune, checkpoints: Path, seed: int, device: str) -> TrainingArguments:
    """The recipe's words as transformers' own."""
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
        use_cpu=device == "cpu",
        seed=seed,
        data_seed=seed,
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
        ddp_find_unused_parameters=False,  # a slice's rest gets a gradient of 0, not none
    )


class DeltaTrainer(Trainer):
    """Trainer, but scales do not decay (towards 0 they would leave the base's grid), and `batch_size` is that of all
    processes together, so that a recipe means the same in any number of them."""

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".gain")]

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Every process draws the whole batch, and `Share` takes its rows of it.

        Accelerate would deal out batches instead, and fill an epoch's last one up with examples seen already.
        """
        loader: DataLoader[Any] = super().get_train_dataloader()
        if self.args.world_size > 1:
            shard: Any = loader.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader


class Share:
    """Collates a process's rows of a batch; one that has none takes part with a row without labels."""

    def __init__(self, collate: Collate, processes: Processes) -> None:
        self.collate, self.processes = collate, processes

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        own = examples[self.processes.rank :: self.processes.count]
        first = examples[0]
        return self.collate(own or [{**first, "labels": [IGNORED] * len(first["labels"])}])


class FiniteLoss(TrainerCallback):
    """Stop at the first loss that is not finite, before a checkpoint is made of it."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise StageError(
                f"the loss is not finite at step {state.global_step}; lower finetune.learning_rate or use float32"
            )
