"""Trainer's settings: the recipe's words as transformers', what evaluation takes away, and when training stops."""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sqft_sparsepeft import QASparsePEFT
from transformers import TrainerControl, TrainerState

from sqft import Orchestrator, Recipe, Registry
from sqft.data.collators import Collator, PackingCollator
from sqft.data.encoding import IGNORED, Example
from sqft.errors import DeviceError, StageError
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.training.trainer import DeltaTrainer, EarlyStopping, RankShardCollator, StopOnNonFiniteLoss
from sqft.planning.optimizers import OPTIMIZERS
from sqft.recipe.sections import Finetune
from sqft.stages.adapted import training_steps
from sqft.stages.finetune import RankSampler
from sqft.stages.training_arguments import training_arguments
from sqft.utils.distributed import Processes

Make = Callable[..., AdaptedModel]
INSTALLED = [name for name, needs in OPTIMIZERS.items() if not needs.package or find_spec(needs.package)]


def finetuned(raw: dict[str, Any], registry: Registry, store: Path, **section: Any) -> Path:
    """The folder of the finetune artifact of the recipe with these words."""
    raw = copy.deepcopy(raw)
    raw.pop("evaluate")
    raw["finetune"] |= section
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)), "finetune")["finetune"].folder


@pytest.fixture
def validation(data: Path) -> str:
    return str(data / "validation.jsonl")


def test_float16_is_refused_on_the_cpu_before_anything_is_made(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(DeviceError, match=r"float16 .* needs an accelerator; on the CPU use bfloat16"):
        finetuned(raw, registry, tmp_path, precision="float16")
    assert not (tmp_path / "artifacts").exists()


def test_looking_at_validation_changes_nothing(
    raw: dict[str, Any], validation: str, registry: Registry, tmp_path: Path
) -> None:
    raw["finetune"]["adapter"]["options"]["dropout"] = 0.1  # draws random numbers, which a look must not take
    plain = finetuned(raw, registry, tmp_path)
    looked = finetuned(raw, registry, tmp_path, validation=validation, evaluate_every=2)
    assert looked != plain
    ours, theirs = load_file(looked / "deltas.safetensors"), load_file(plain / "deltas.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    entries = [json.loads(line) for line in (looked / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4, 6]


def test_a_look_is_search_s_loss_at_the_largest_ranks(
    raw: dict[str, Any], validation: str, registry: Registry, tmp_path: Path
) -> None:
    """The last look against the loss that a search measures of the stored deltas."""
    folder = finetuned(raw, registry, tmp_path, validation={"path": validation, "limit": 8})
    (seen,) = [json.loads(x)["eval_loss"] for x in (folder / "log.jsonl").read_text().splitlines() if "eval_loss" in x]
    from sqft.data.encoding import Tokenization
    from sqft.data.records import read_records
    from sqft.modeling.evaluation import summed_loss
    from sqft.modeling.training.loss import CompletionLoss
    from sqft.stages.adapted import load_adapted_model
    from sqft.utils.progress import silent

    raw = copy.deepcopy(raw)
    raw["finetune"]["validation"] = {"path": validation, "limit": 8}
    orchestrator = Orchestrator(registry, tmp_path)
    plan = orchestrator.plan(Recipe.parse(raw))
    sparse = orchestrator.store.find("sparsify", plan.step("sparsify").fingerprint)
    assert sparse is not None
    adapted = load_adapted_model(plan, {"base": sparse.folder}, folder, "cpu")
    examples = Tokenization(adapted.tokenizer, 256, "completion").encode(read_records(Path(validation), 8)).examples
    total, labels = summed_loss(CompletionLoss(adapted.model), examples, 3, 1, silent)
    assert total / labels == pytest.approx(seen, rel=1e-5)


def test_patience_stops_and_keeps_the_best(
    raw: dict[str, Any], validation: str, registry: Registry, tmp_path: Path
) -> None:
    """A learning rate that ruins the model: what is kept is what a run as long as the best step would have had."""
    words = {"steps": 30, "learning_rate": 0.3, "schedule": "constant", "validation": validation, "evaluate_every": 1}
    stopped = finetuned(raw, registry, tmp_path, **words, patience=3)
    report = json.loads((stopped / "manifest.json").read_text())["report"]
    losses = report["validation_losses"]
    best = losses.index(min(losses)) + 1
    assert report["best_step"] == best and report["steps"] == len(losses) == best + 3 < 30
    shorter = finetuned(raw, registry, tmp_path, **words | {"steps": best})
    ours, theirs = load_file(stopped / "deltas.safetensors"), load_file(shorter / "deltas.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    # What was measured with deltas that are gone says nothing of those that are kept.
    assert training_steps(stopped) == training_steps(shorter) and len(training_steps(stopped)) == best


def test_best_goes_on_where_a_checkpoint_left_it(tmp_path: Path) -> None:
    model: Any = torch.nn.Linear(2, 2)
    best = EarlyStopping(model, 2, Processes())
    state, control, args = TrainerState(global_step=1), TrainerControl(), type("A", (), {"output_dir": str(tmp_path)})
    best.on_evaluate(args, state, control, metrics={"eval_loss": 0.1})
    state.global_step = 2
    best.on_evaluate(args, state, control, metrics={"eval_loss": math.nan})
    assert not control.should_training_stop
    (tmp_path / "checkpoint-2").mkdir()
    best.on_save(args, state, control)
    again = EarlyStopping(torch.nn.Linear(2, 2), 2, Processes())  # type: ignore[arg-type]
    again.load(tmp_path / "checkpoint-2")
    assert (again.loss, again.step, again.waited, again.stops) == (0.1, 1, 1, False)
    again.on_evaluate(args, state, control, metrics={"eval_loss": 0.2})
    assert again.stops and control.should_training_stop
    again.restore()
    assert torch.equal(again.model.weight, model.weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("count", "examples"), [(2, 5), (3, 2), (1, 4)])
def test_each_row_of_a_batch_belongs_to_one_process(count: int, examples: int) -> None:
    rows = [Example((n, n), (IGNORED, n)) for n in range(examples)]
    seen: list[int] = []
    for rank in range(count):
        batch = RankShardCollator(Collator(0), Processes(rank, count))(rows)
        seen += batch["labels"][:, 1].tolist()
    assert sorted(n for n in seen if n != IGNORED) == list(range(examples))


def test_each_packed_row_belongs_to_one_process() -> None:
    rows = [[Example((n, n), (IGNORED, n)), Example((n, n), (IGNORED, n))] for n in (7, 8)]
    batches = [RankShardCollator(PackingCollator(0), Processes(rank, 3))(rows) for rank in range(3)]
    assert [batch["labels"].tolist() for batch in batches] == [
        [[IGNORED, 7, IGNORED, 7]],
        [[IGNORED, 8, IGNORED, 8]],
        [[IGNORED] * 4],  # it takes part, and learns nothing
    ]


def test_a_loss_that_is_not_finite_stops_training() -> None:
    """At the step that logs it, before its checkpoint; lines that log something else pass."""
    stop, state, control = StopOnNonFiniteLoss(), TrainerState(global_step=7), TrainerControl()
    for logs in (None, {}, {"loss": 0.5}, {"eval_loss": math.nan}):
        stop.on_log(None, state, control, logs=logs)
    with pytest.raises(StageError, match=r"the loss is not finite at step 7; lower finetune\.learning_rate"):
        stop.on_log(None, state, control, logs={"loss": math.inf})


@pytest.mark.parametrize(("patience", "stops"), [(None, False), (2, True), (3, False)])
def test_patience_counts_evaluations_without_a_lower_loss(patience: int | None, stops: bool) -> None:
    model: Any = torch.nn.Linear(1, 1, bias=False)
    best, control = EarlyStopping(model, patience, Processes()), TrainerControl()
    for step, loss in enumerate((3.0, 1.0, 1.0, 2.0)):
        model.weight.data.fill_(step)
        best.on_evaluate(None, TrainerState(global_step=step), control, metrics={"eval_loss": loss})
    assert (best.loss, best.step, best.waited) == (1.0, 1, 2)
    assert best.stops == control.should_training_stop == stops
    best.restore()
    assert model.weight.item() == (3 if patience is None else 1)  # without patience the last deltas stay


def test_a_chunk_at_a_time_trains_the_same(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    whole, chunks = (finetuned(raw, registry, tmp_path, loss_chunk=chunk) for chunk in (None, 3))
    ours, theirs = load_file(chunks / "deltas.safetensors"), load_file(whole / "deltas.safetensors")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def trainer_of(adapted: AdaptedModel, folder: Path, ratio: float, **words: Any) -> DeltaTrainer:
    words = {"adapter": "nls", "merger": "sparsepeft", "data": "x.jsonl", "learning_rate": 0.01, **words}
    arguments = training_arguments(Finetune.model_validate(words), folder, 0, "cpu")
    return DeltaTrainer(adapted, Processes(), folder, ratio, model=adapted.model, args=arguments)


@pytest.mark.parametrize("ratio", [1.0, 4.0, 0.5])
def test_b_has_a_learning_rate_of_its_own(adapted_model: Make, tmp_path: Path, ratio: float) -> None:
    """LoRA+: AdamW's first step is the learning rate against each gradient's sign; the scales of a grid keep theirs."""
    adapted = adapted_model(QASparsePEFT(), True)
    trainer = trainer_of(adapted, tmp_path, ratio, schedule="constant")
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer and len(optimizer.param_groups) == (2 if ratio == 1 else 3)
    trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
    before = {name: p.detach().clone() for name, p in trained.items()}
    for p in trained.values():
        p.grad = torch.randn(p.shape).sign() * (0.1 + torch.rand(p.shape))
    optimizer.step()
    assert {name.rpartition(".")[2] for name in trained} == {"A", "B", "scale_multiplier"}
    for name, p in trained.items():
        assert p.grad is not None
        step = 0.01 * (ratio if name.endswith(".B") else 1)
        torch.testing.assert_close(p.detach(), before[name] - step * p.grad.sign(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optimizer", INSTALLED)
def test_b_moves_by_its_ratio_with_every_optimizer(adapted_model: Make, tmp_path: Path, optimizer: str) -> None:
    """A first step is proportional to the learning rate; the numbers of eight bits differ a little."""
    moved = []
    for ratio in (1.0, 4.0):
        adapted = adapted_model(QASparsePEFT(), True)
        made = trainer_of(adapted, tmp_path, ratio, schedule="constant", optimizer=optimizer).create_optimizer()
        trained = {name: p for name, p in adapted.model.named_parameters() if p.requires_grad}
        before = {name: p.detach().clone() for name, p in trained.items()}
        generator = torch.Generator().manual_seed(0)
        for p in trained.values():
            p.grad = torch.randn(p.shape, generator=generator)
        made.step()
        moved.append({name: p.detach() - before[name] for name, p in trained.items()})
    for name in moved[0]:
        ratio = 4 if name.endswith(".B") else 1
        assert moved[0][name].any()
        torch.testing.assert_close(moved[1][name], ratio * moved[0][name], rtol=1e-3, atol=2e-6)


def test_b_decays_and_warms_up_like_a(adapted_model: Make, tmp_path: Path) -> None:
    trainer = trainer_of(adapted_model(QASparsePEFT(), True), tmp_path, 4.0, weight_decay=0.1, warmup_steps=10)
    optimizer = trainer.create_optimizer()
    scheduler = trainer.create_scheduler(20)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.1]
    for _ in range(5):
        optimizer.step(), scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.005, 0.005, 0.02])


def test_an_adapter_without_parameters_for_b_alone(adapted_model: Make, tmp_path: Path) -> None:
    adapted = adapted_model(QASparsePEFT())
    for layer in adapted.layers.values():
        layer.delta.B.requires_grad_(False)  # type: ignore[attr-defined]
    with pytest.raises(StageError, match=r"finetune\.learning_rate_ratio: the adapter has no parameters for B alone"):
        trainer_of(adapted, tmp_path, 4.0).create_optimizer()


@pytest.mark.parametrize("optimizer", sorted({"adamw_torch", "adafactor", "rmsprop", "lion_8bit"} & {*INSTALLED}))
def test_both_learning_rates_go_on_from_a_checkpoint(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str
) -> None:
    plain = finetuned(raw, registry, tmp_path / "plain", optimizer=optimizer)
    words = {"learning_rate_ratio": 8.0, "warmup_steps": 2, "optimizer": optimizer}
    whole = finetuned(raw, registry, tmp_path / "whole", **words)
    begin = RankSampler.on_step_begin

    def stop(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(RankSampler, "on_step_begin", stop)
        with pytest.raises(KeyboardInterrupt):
            finetuned(raw, registry, tmp_path / "killed", **words)
    killed = finetuned(raw, registry, tmp_path / "killed", **words)
    assert json.loads((killed / "manifest.json").read_text())["report"]["resumed_from"] == "checkpoint-4"
    one, other, without = (load_file(folder / "deltas.safetensors") for folder in (whole, killed, plain))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(torch.equal(one[name], without[name]) for name in one if name.endswith("B"))


def test_a_seed_of_its_own_leaves_the_base_alone(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    plain, seeded, same = (finetuned(raw, registry, tmp_path, seed=seed) for seed in (None, 1, 0))
    assert len(list((tmp_path / "artifacts").glob("sparsify-*"))) == 1
    deltas = [load_file(folder / "deltas.safetensors") for folder in (plain, seeded, same)]
    assert any(not torch.equal(deltas[0][name], deltas[1][name]) for name in deltas[0])
    assert all(torch.equal(deltas[0][name], deltas[2][name]) for name in deltas[0])


def test_ranks_are_a_function_of_seed_and_step_alone(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[tuple[int, Any]]] = []
    begin = RankSampler.on_step_begin

    def on_step_begin(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        seen[-1].append((state.global_step, [layer.rank for layer in self.adapted.layers.values()]))

    monkeypatch.setattr(RankSampler, "on_step_begin", on_step_begin)
    for batch in (4, 8):
        torch.manual_seed(batch)
        seen.append([])
        finetuned(raw, registry, tmp_path, batch_size=batch)
    assert seen[0] == seen[1] and len({str(ranks) for _, ranks in seen[0]}) > 1


@pytest.mark.parametrize("named", [False, True])
def test_trackers_are_told_and_change_no_fingerprint(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """A writer in tensorboard's place, which is not needed to test sqft."""
    written: list[tuple[str, str]] = []

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None:
            self.log_dir = log_dir

        def add_scalar(self, tag: str, value: float, step: int) -> None:
            written.append((self.log_dir, f"{tag} {step}"))

        def add_text(self, *args: Any) -> None: ...
        def flush(self) -> None: ...
        def close(self) -> None: ...

    for name in ("tensorboard", "torch.utils.tensorboard"):
        module = ModuleType(name)
        module.__spec__ = sys.__spec__
        module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    where = {"logging_dir": str(tmp_path / "mine")} if named else {}
    folder = finetuned(raw, registry, tmp_path / "store", report_to="tensorboard", **where)
    assert [tag for _, tag in written if tag.startswith("train/loss ")] == [f"train/loss {n}" for n in range(1, 7)]
    assert {Path(place).name for place, _ in written} == ({"mine"} if named else {"logs"})
    assert finetuned(raw, registry, tmp_path / "store") == folder
