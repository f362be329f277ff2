"""The recipe's words for training as transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sqft.recipe.sections import Finetune
from sqft.stages.training_arguments import training_arguments


def section(**words: Any) -> Finetune:
    return Finetune.model_validate({"adapter": "nls", "merger": "sparsepeft", "data": "x.jsonl", **words})


SCHEDULES = Finetune.model_fields["schedule"].annotation.__args__  # type: ignore[union-attr]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_need_nothing_else(schedule: str, tmp_path: Path) -> None:
    from transformers import get_scheduler

    made = training_arguments(section(schedule=schedule, warmup_ratio=0.1), tmp_path, 0, "cpu")
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=made.learning_rate)
    scheduler = get_scheduler(
        made.lr_scheduler_type, optimizer, num_warmup_steps=made.get_warmup_steps(50), num_training_steps=50
    )
    rates = []
    for _ in range(50):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[5] == pytest.approx(3e-4)
    assert (rates[0] == 0) == (schedule != "constant")
    assert (rates[-1] < 3e-4) == ("constant" not in schedule)


def test_words_are_passed_on(tmp_path: Path) -> None:
    words = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1, "warmup_steps": 7}
    made = training_arguments(section(**words), tmp_path, 3, "cpu")
    assert {name: getattr(made, name) for name in words} == words
    assert (made.seed, made.data_seed, made.report_to, made.eval_strategy) == (3, 3, [], "no")
