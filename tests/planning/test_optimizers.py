"""What the plan says of each optimizer, against the optimizer that transformers makes."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from sqft.planning import optimizers
from sqft.planning.optimizers import ADAM, OPTIMIZERS, check_optimizer
from sqft.planning.training_memory import estimate_finetune
from sqft.recipe.choices import OptimizerName
from sqft.recipe.sections import Finetune
from sqft.stages.training_arguments import training_arguments
from tests.planning.test_training_memory import SIZES, ModelLayout, ModelSource

INSTALLED = [name for name, needs in OPTIMIZERS.items() if not needs.package or find_spec(needs.package)]


def section(**words: Any) -> Finetune:
    return Finetune.model_validate({"adapter": "nls", "merger": "sparsepeft", "data": "x.jsonl", **words})


def made(folder: Path, **words: Any) -> torch.optim.Optimizer:
    model = nn.Linear(4096, 16, bias=False)
    trainer = Trainer(model, training_arguments(section(**words), folder, 0, "cpu"))
    optimizer: torch.optim.Optimizer = trainer.create_optimizer()
    model.weight.grad = torch.randn(16, 4096)
    optimizer.step()
    return optimizer


def tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, Tensor))


def test_every_name_is_transformers_own_and_known_to_the_plan() -> None:
    assert set(OPTIMIZERS) == set(get_args(OptimizerName)) <= {name.value for name in OptimizerNames}
    assert {"adamw_torch", "adafactor", "sgd"} <= set(INSTALLED)


@pytest.mark.parametrize("name", INSTALLED)
def test_state_and_constants(name: OptimizerName, tmp_path: Path) -> None:
    optimizer = made(tmp_path, optimizer=name)
    kept = sum(tensor.numel() * tensor.element_size() for tensor in tensors(optimizer)) / (16 * 4096)
    small = 0.3  # scales of blocks and tables of values, which are few in a large model
    assert kept <= OPTIMIZERS[name].state + small
    assert kept >= OPTIMIZERS[name].state / 2 or name == "adafactor"  # at rank 16 a row and a column are less

    def settings(**words: Any) -> str:
        return str(
            [(k, v) for k, v in made(tmp_path, optimizer=name, **words).param_groups[0].items() if k != "params"]
        )

    taken = {constant for constant in ADAM if settings(**{constant: 0.25}) != settings()}
    assert taken >= set(OPTIMIZERS[name].constants)
    assert name.startswith(("lion", "paged_lion")) or taken == set(OPTIMIZERS[name].constants)


def test_a_missing_package_is_named_with_what_works_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: None)
    (problem,) = check_optimizer(section(optimizer="adamw_8bit", adam_beta1=0.8))
    assert str(problem).startswith("finetune.optimizer: 'adamw_8bit' needs bitsandbytes, which is not installed; ")
    assert str(problem).endswith("use one of adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop")
    assert not list(check_optimizer(section(optimizer="adamw_torch_fused", adam_beta1=0.8)))
    monkeypatch.setattr(optimizers, "find_spec", lambda name: object())
    assert not list(check_optimizer(section(optimizer="adamw_8bit")))


@pytest.mark.parametrize(("name", "refused"), [("sgd", ADAM), ("lion_8bit", ADAM[2:]), ("adamw_torch", ())])
def test_a_constant_that_an_optimizer_has_not(
    name: OptimizerName, refused: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizers, "find_spec", lambda name: object())
    problems = list(check_optimizer(section(optimizer=name, **dict.fromkeys(ADAM, 0.5))))
    assert [problem.place for problem in problems] == [f"finetune.{constant}" for constant in refused]
    assert all(f"optimizer '{name}' has no such constant" in str(problem) for problem in problems)


def test_the_plan_counts_the_state() -> None:
    source = ModelSource("folder", Path("m"), "", {}, ModelLayout(sizes=SIZES))
    adam, sgd = (
        estimate_finetune(source, "float32", section(optimizer=name), 100, 7) for name in ("adamw_torch", "sgd")
    )
    assert adam.memory - sgd.memory == 8 * 100
