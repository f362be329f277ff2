"""Fine-tuning by itself: what it stores, what it finds wrong with what is stored, and which ranks it trains."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sqft_nls.adapter import Nls
from sqft_sparsepeft import SparsePEFT

from sqft import Orchestrator, Recipe, Registry
from sqft.api import LinearShape, RankConfig, TrainingStep
from sqft.data.records import Record
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.modeling.adapters.adapted_linear import adapt
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.frozen_weight import FloatWeight
from sqft.stages.adapted import training_steps
from sqft.stages.finetune import FinetuneStage, Progress, RankSampler, check_first_combine, unknown_ends, unlearnt
from sqft.stages.inputs import StageInputs
from sqft.utils.progress import silent


@pytest.fixture
def stage(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> FinetuneStage:
    """The stage on the recipe's own dense model; its scratch folder is `tmp_path / "scratch"`."""
    raw["finetune"] |= {"steps": 2, "targets": ["q_proj", "up_proj"]}
    raw = {key: raw[key] for key in ("schema", "name", "model", "finetune")}
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    (tmp_path / "scratch").mkdir()
    return FinetuneStage(StageInputs(plan, plan.step("finetune"), {}, tmp_path / "scratch", "cpu"))


def test_what_it_stores_is_what_it_trained_and_passes(stage: FinetuneStage) -> None:
    report = stage.run()
    trained = {name: value.clone() for name, value in stage.adapted.deltas().items()}
    stored = load_file(stage.inputs.scratch / "deltas.safetensors")
    assert stored.keys() == trained.keys() and all(stored[name].equal(value) for name, value in trained.items())
    assert (
        report["steps"] == 2
        and report["examples"] == 64
        and report["trainable"] == sum(map(torch.numel, stored.values()))
    )
    assert len((stage.inputs.scratch / "log.jsonl").read_text().splitlines()) == 2
    stage.verify()


def test_the_log_has_the_ranks_that_each_step_trained(
    raw: dict[str, Any], stage: FinetuneStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[RankConfig] = []
    set_ranks = AdaptedModel.set_ranks
    monkeypatch.setattr(
        AdaptedModel, "set_ranks", lambda self, config: (trained.append(config), set_ranks(self, config))[1]
    )
    tracked: list[dict[str, Any]] = []
    on_log = RankSampler.on_log

    def log(self: RankSampler, *states: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        on_log(self, *states, logs=logs, **kwargs)
        tracked.append(logs)

    monkeypatch.setattr(RankSampler, "on_log", log)
    stage.run()
    assert tracked and not any("ranks" in logs for logs in tracked)  # trackers take numbers
    losses = [json.loads(line)["loss"] for line in (stage.inputs.scratch / "log.jsonl").read_text().splitlines()]
    assert len(set(trained)) == 2
    assert training_steps(stage.inputs.scratch) == list(map(TrainingStep, trained, losses))


def changed(name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    def damage(file: Path) -> None:
        tensors = load_file(file)
        value = change(tensors.pop(name))
        save_file(tensors if value is None else tensors | {name: value}, file)

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda name: changed(name, lambda _: None), "and the adapter disagree about tensor {}"),
        (lambda name: changed(name, lambda B: B[:, :2].contiguous()), "{} is mis-shaped or not finite"),
        (lambda name: changed(name, lambda B: B / 0), "{} is mis-shaped or not finite"),
    ],
    ids=["gone", "of another shape", "not finite"],
)
def test_stored_deltas_that_are_damaged(stage: FinetuneStage, damage: Any, message: str) -> None:
    """`verify` looks at what is on disk, whatever the model in memory holds."""
    stage.run()
    name = next(key for key in stage.adapted.deltas() if "up_proj" in key and key.endswith("B"))
    damage(name)(stage.inputs.scratch / "deltas.safetensors")
    with pytest.raises(ArtifactError, match=message.format(name)):
        stage.verify()


def test_a_stored_delta_that_is_zero(stage: FinetuneStage) -> None:
    stage.run()
    name = next(key for key in stage.adapted.deltas() if "layers.1.mlp.up_proj" in key and key.endswith("B"))
    changed(name, torch.zeros_like)(stage.inputs.scratch / "deltas.safetensors")
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj did not train: its delta is still zero"):
        stage.verify()


def test_a_stored_space_that_is_another(stage: FinetuneStage) -> None:
    stage.run()
    file = stage.inputs.scratch / "space.json"
    file.write_text(file.read_text().replace("8", "7", 1))
    with pytest.raises(ContractError, match="gave another search space than in training"):
        stage.verify()


def test_training_goes_on_where_an_earlier_attempt_stopped(stage: FinetuneStage, tmp_path: Path) -> None:
    """A second stage over the scratch folder of the first finds its last checkpoint, and stores the same."""
    stage.run()
    first = load_file(tmp_path / "scratch" / "deltas.safetensors")
    (tmp_path / "scratch" / "deltas.safetensors").unlink()
    again = FinetuneStage(stage.inputs)
    assert again.run()["resumed_from"] == "checkpoint-2"
    assert all(value.equal(first[name]) for name, value in again.adapted.deltas().items())
    shutil.rmtree(tmp_path / "scratch")


def layer(weight: torch.Tensor) -> Any:
    shape = LinearShape("l", weight.shape[0], weight.shape[1])
    return adapt(
        FloatWeight(weight, True), None, Nls(ranks=(4,), alpha=8.0).delta(shape, torch.Generator()), SparsePEFT()
    )


def test_a_layer_that_keeps_nothing_cannot_train() -> None:
    layers = {"full": layer(torch.ones(8, 8)), "empty": layer(torch.zeros(8, 8))}
    with pytest.raises(StageError, match=r"finetune\.targets: empty keeps none of its weights"):
        check_first_combine(SimpleNamespace(mergeable=layers), SparsePEFT(), "merger")  # type: ignore[arg-type]
    check_first_combine(SimpleNamespace(mergeable={"full": layers["full"]}), SparsePEFT(), "merger")  # type: ignore[arg-type]


def test_ranks_are_a_pure_function_of_the_step() -> None:
    """In whatever order steps are trained: a resumed run trains the ranks of an uninterrupted one."""
    adapter = Nls(ranks=(8, 6, 4), alpha=16.0)
    space = adapter.space([LinearShape(f"l.{index}", 16, 16) for index in range(4)])
    seen: list[RankConfig] = []
    adapted: Any = SimpleNamespace(space=space, set_ranks=seen.append)
    sampler = RankSampler(adapted, adapter, "adapter", lambda *names: Random(str(names)).getrandbits(63))
    for step in (0, 1, 2, 3, 2, 0):
        sampler.on_step_begin(None, SimpleNamespace(global_step=step), None)
    assert seen[4] == seen[2] and seen[5] == seen[0] and len(set(seen)) > 1


def test_an_adapter_that_samples_outside_its_space() -> None:
    adapter = Nls(ranks=(8, 4), alpha=16.0)
    adapted: Any = SimpleNamespace(space=adapter.space([LinearShape("l", 16, 16)]))
    strange: Any = SimpleNamespace(sample=lambda space, rng: RankConfig((5,)))
    with pytest.raises(ContractError, match=r"adapter 'x' returned .*no configuration"):
        RankSampler(adapted, strange, "adapter 'x'", lambda *_: 0).on_step_begin(
            None, SimpleNamespace(global_step=0), None
        )


def test_the_display_shows_the_steps_that_are_left() -> None:
    shown: list[Any] = []

    def track(iterable: Any, label: str, total: int | None = None) -> Any:
        shown.append((label, total))
        return silent(iterable, label, total)

    progress = Progress(track)
    state = SimpleNamespace(max_steps=5, global_step=3)
    progress.on_train_begin(None, state, None)
    for _ in range(2):
        progress.on_step_begin(None, state, None)
        progress.on_step_end(None, state, None)
    assert shown == [("fine-tuning", 2)] and len(progress.seconds) == 2


def test_cut_examples_are_reported(stage: FinetuneStage, caplog: pytest.LogCaptureFixture) -> None:
    stage.section = stage.section.model_copy(update={"max_length": 4})
    with caplog.at_level(logging.WARNING, "sqft"):
        encoded = stage._encode("data", stage.inputs.data.training_records()[0])
    assert encoded.truncated and f"finetune.data: {encoded.truncated} of 64 examples were cut to 4" in caplog.text


def test_examples_that_are_left_out_are_reported(
    stage: FinetuneStage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Six tokens where the sum has one digit, seven where it has two."""
    stage.section = stage.section.model_copy(update={"max_length": 6, "truncation": "drop"})
    long = sum(a + b >= 10 for a in range(8) for b in range(8))
    with caplog.at_level(logging.WARNING, "sqft"):
        report = stage.run()
    assert (report["examples"], report["dropped"], report["truncated"]) == (64 - long, long, 0)
    said = (
        f'finetune.data: {long} of 64 examples were left out: of more than 6 tokens, truncation "drop" leaves nothing'
    )
    assert said in caplog.text


def test_data_sets_of_which_nothing_is_learnt() -> None:
    sets: dict[str, list[Any]] = {"data.0": [{}] * 2, "data.1": [{}] * 3, "data.2": [{}], "data.3": []}
    assert unlearnt(sets, [0, 0, 0, 2, 0, 0]) == ["data.0", "data.2"]


def test_ends_at_which_generation_goes_on_are_named(stage: FinetuneStage) -> None:
    model, tokenizer = stage.adapted.model, stage.adapted.tokenizer
    assert unknown_ends(model, tokenizer, [tokenizer.eos_token_id, 0]) == ["<|im_start|>"]
    model.generation_config.eos_token_id = [0, 1]
    assert unknown_ends(model, tokenizer, [0, 1]) == []
    model.generation_config = None
    assert unknown_ends(model, tokenizer, [1, 0]) == ["<|im_start|>"]


def test_answers_without_an_end_are_warned_of(stage: FinetuneStage, caplog: pytest.LogCaptureFixture) -> None:
    stage.adapted.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    stage._encode("data", [Record(record)])
    assert "finetune.data: 1 of 1 examples hold no end of turn to learn" in caplog.text
