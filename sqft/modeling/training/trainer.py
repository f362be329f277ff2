"""transformers' Trainer for deltas: its batches in several processes, validation, and when it stops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl
from transformers.integrations import TensorBoardCallback

from sqft.data.encoding import IGNORED
from sqft.errors import StageError
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.evaluation import summed_loss
from sqft.modeling.training.loss import CompletionLoss
from sqft.ranks import RankConfig
from sqft.utils.distributed import Processes
from sqft.utils.progress import silent

BEST = "best.safetensors"
Collate = Callable[[Sequence[Any]], dict[str, Tensor]]


class DeltaTrainer(Trainer):
    """Trainer with three changes: the grid's scale multipliers have no weight decay (at 1 they are the base's grid, and
    decay would pull them towards 0), B may have a learning rate of its own (LoRA+, Hayou et al. 2024), and
    `batch_size` is that of all processes together, so that a recipe means the same in any number of them.

    `eval_dataset` is a list of `Example`; `logs` is the folder for tensorboard's files; `rate_ratio` is B's learning
    rate, as a multiple of what `args` says.
    """

    model: CompletionLoss
    control: TrainerControl

    def __init__(
        self, adapted: AdaptedModel, processes: Processes, logs: Path, rate_ratio: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.adapted, self.processes, self.rate_ratio = adapted, processes, rate_ratio
        self.remove_callback(PrinterCallback)
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                callback.logging_dir = str(logs)

    def get_decay_parameter_names(self, model: Any) -> list[str]:
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".scale_multiplier")]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make the optimizer, with the parameters of B in groups of their own where B has a learning rate of its own.

        Raises:
            StageError: when it should have one, but the adapter makes A and B of the same parameters, or trains no B.
        """
        made = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(model)
        if made and self.rate_ratio != 1:
            faster = {parameter for layer in self.adapted.layers.values() for parameter in layer.parameters_of_B()}
            if not faster:
                raise StageError("finetune.learning_rate_ratio: the adapter has no parameters for B alone; remove it")
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in faster]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in faster]
                    optimizer.add_param_group({**group, "params": own, "lr": group["lr"] * self.rate_ratio})
        return optimizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return a loader from which every process draws the same batch; `RankShardCollator` takes the process's rows.

        Accelerate would give each process other batches, and fill an epoch's last one up with examples used already.
        """
        loader: DataLoader[Any] = super().get_train_dataloader()
        if self.args.world_size > 1:
            shard: Any = loader.batch_sampler
            shard.num_processes, shard.process_index, shard.even_batches = 1, 0, False
        return loader

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log a step's mean divergence from the teacher, in all processes together, beside its loss."""
        if "loss" in logs and self.model.distillation is not None:
            own = torch.as_tensor(self.model.divergence, dtype=torch.float32, device=self.args.device)
            logs["kl"] = float(self.accelerator.reduce(own, "sum"))
            self.model.divergence = 0.0
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure the mean loss of a label on `eval_dataset`, at the largest ranks; each process measures a part."""
        self.adapted.set_ranks(RankConfig(tuple(max(group.ranks) for group in self.adapted.space.groups)))
        own = self.eval_dataset[self.processes.rank :: self.processes.count]
        rows = max(1, self.args.per_device_train_batch_size // self.processes.count)
        sums = summed_loss(self.model, own, rows, self.adapted.tokenizer.pad_token_id, silent)
        total, labels = self.accelerator.reduce(torch.tensor(sums, dtype=torch.float64, device=self.args.device), "sum")
        metrics = {"eval_loss": float(total / labels)}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def first_drawn(rows: int, count: int, seed: int) -> list[int]:
    """Return which of some rows Trainer draws first, in order: `count` of them, or all in one epoch."""
    return list(SeedableRandomSampler(range(rows), data_seed=seed))[:count]


class EarlyStopping(TrainerCallback):
    """Remember the lowest validation loss and the deltas that had it, in every checkpoint too, and say when to stop."""

    def __init__(self, model: CompletionLoss, patience: int | None, processes: Processes) -> None:
        self.model, self.patience, self.processes = model, patience, processes
        self.loss, self.step, self.waited = math.inf, 0, 0
        self.kept: dict[str, Tensor] = {}

    @property
    def stops(self) -> bool:
        """Whether `patience` evaluations have passed without a lower loss."""
        return self.patience is not None and self.waited >= self.patience

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= bool(args.eval_strategy != "no" and state.global_step >= state.max_steps)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = kwargs["metrics"]["eval_loss"]
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, state.global_step, 0
            self.kept = {name: value.detach().cpu().clone() for name, value in self.model.state_dict().items()}
        else:
            self.waited += 1
        control.should_training_stop |= self.stops

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.kept and self.processes.is_main:
            numbers = {"loss": repr(self.loss), "step": str(self.step), "waited": str(self.waited)}
            save_file(self.kept, Path(args.output_dir) / f"checkpoint-{state.global_step}" / BEST, metadata=numbers)

    def load(self, checkpoint: Path) -> None:
        """Take over what a checkpoint stored."""
        if (checkpoint / BEST).is_file():
            with safe_open(checkpoint / BEST, "pt") as stored:
                numbers = stored.metadata()
                self.kept = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
            self.loss, self.step, self.waited = float(numbers["loss"]), int(numbers["step"]), int(numbers["waited"])

    @property
    def restores(self) -> bool:
        """Whether the deltas of the lowest loss are the result: if `patience` was given."""
        return self.patience is not None and bool(self.kept)

    def restore(self) -> None:
        """Put the deltas of the lowest loss back, if they are the result."""
        if self.restores:
            self.model.load_state_dict(self.kept)


class RankShardCollator:
    """Collate the rows of a batch that are this process's; a process that has none gets a row without labels."""

    def __init__(self, collate: Collate, processes: Processes) -> None:
        self.collate, self.processes = collate, processes

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        own = examples[self.processes.rank :: self.processes.count]
        batch = self.collate(own or examples[:1])
        if not own:
            batch["labels"].fill_(IGNORED)
            batch |= {name: batch[name][:0] for name in ("probabilities", "tokens") if name in batch}  # [labels, …]
        return batch


class StopOnNonFiniteLoss(TrainerCallback):
    """Stop at the first loss that is not finite, before a checkpoint is made of it."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        loss = (kwargs.get("logs") or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise StageError(
                f"the loss is not finite at step {state.global_step}; lower finetune.learning_rate or use float32"
            )
