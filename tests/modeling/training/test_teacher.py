"""A teacher: its predictions, how they are kept and found again, and what a student learns of them."""

from __future__ import annotations

import errno
import json
import os
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.data.collators import Collator, PackingCollator, pack
from sqft.data.encoding import IGNORED, Example, Tokenization
from sqft.errors import StageError
from sqft.modeling.training import teacher as teachers
from sqft.modeling.training.teacher import Predictions, TaughtCollator, Teacher, check_same_tokens
from sqft.stages import finetune
from sqft.stages.finetune import FinetuneStage, Progress
from sqft.stages.inputs import StageInputs
from sqft.utils.distributed import Processes
from sqft.utils.progress import silent

RECORDS: list[dict[str, Any]] = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "what comes after 12?", "completion": "13, then 14"},
    {"text": "a text, all of which is learnt"},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "bc"}] * 2},
]


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerFast) -> list[Example]:
    return Tokenization(tokenizer, 64, "completion").encode([*RECORDS, RECORDS[0]]).examples


def teacher(folder: Path, **changes: Any) -> Teacher:
    words: dict[str, Any] = {"temperature": 2.0, "top_k": 5, "vocabulary": 258, "batch_size": 2, "chunk": None}
    return Teacher(ModelSpec(folder, "float32"), **words | {"precision": "float32", "device": "cpu"} | changes)


def expected(model: Any, example: Example) -> Tensor:
    """What the model says of an example's labels at temperature 2, read by itself: [labels, vocabulary]."""
    with torch.no_grad():
        logits = model(torch.tensor([example.input_ids])).logits[0, :-1]
    return (logits[[label != IGNORED for label in example.labels[1:]]] / 2).softmax(-1)


@pytest.mark.parametrize(("top_k", "chunk"), [(5, None), (None, 3), (1000, None)])
def test_predictions_are_the_model_s_at_each_label(
    model_folder: Path, examples: list[Example], tmp_path: Path, top_k: int | None, chunk: int | None
) -> None:
    made = teacher(model_folder, top_k=top_k, chunk=chunk).predictions(examples, tmp_path, Processes(), silent)
    assert len(made.places) == len(examples) - 1  # the first record comes twice, and is read once
    model = LlamaForCausalLM.from_pretrained(model_folder)
    for example in examples:
        whole, found = expected(model, example), made.of([example])
        if top_k != 5:
            torch.testing.assert_close(found, {"probabilities": whole}, rtol=1e-5, atol=1e-7)
            continue
        top = whole.topk(5)
        torch.testing.assert_close(found["probabilities"][:, :5], top.values, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found["probabilities"].sum(1), torch.ones(len(whole)))
        assert whole.gather(1, found["tokens"].long()).allclose(top.values)


@pytest.mark.parametrize("packed", [False, True])
def test_a_batch_has_the_predictions_of_its_labels_in_order(
    model_folder: Path, examples: list[Example], tmp_path: Path, packed: bool
) -> None:
    made = teacher(model_folder, top_k=None).predictions(examples, tmp_path, Processes(), silent)
    rows: Any = pack(examples, 64) if packed else examples[::-1]
    batch = TaughtCollator(PackingCollator(1) if packed else Collator(1), made)(rows)
    assert (batch["labels"] != IGNORED).sum() == len(batch["probabilities"])
    given = {name: batch[name] for name in batch.keys() & {"input_ids", "attention_mask", "position_ids"}}
    with torch.no_grad():
        logits = LlamaForCausalLM.from_pretrained(model_folder)(**given, use_cache=False).logits[:, :-1]
    there = (logits[batch["labels"][:, 1:] != IGNORED] / 2).softmax(-1)
    torch.testing.assert_close(batch["probabilities"], there, rtol=1e-5, atol=1e-7)


def test_predictions_of_an_earlier_attempt_are_used_if_they_are_whole(
    model_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[ModelSpec] = []
    load = teachers.load_model
    monkeypatch.setattr(teachers, "load_model", lambda spec: loaded.append(spec) or load(spec))
    kept = [teacher(model_folder).predictions(examples, tmp_path, Processes(), silent).of(examples) for _ in range(2)]
    assert len(loaded) == 1
    (tmp_path / "tokens").write_bytes(b"\1" + (tmp_path / "tokens").read_bytes()[1:])
    kept.append(teacher(model_folder).predictions(examples, tmp_path, Processes(), silent).of(examples))
    assert len(loaded) == 2
    assert all(torch.equal(one[name], kept[0][name]) for one in kept for name in one)


def test_two_processes_make_the_predictions_of_one(
    model_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One after the other in the same folder, without what brings them together; the first one prepares the files."""
    one = teacher(model_folder).predictions(examples, tmp_path / "one", Processes(), silent)
    monkeypatch.setattr(Processes, "share", lambda self, message: "")
    monkeypatch.setattr(Processes, "barrier", lambda self: None)
    monkeypatch.setattr(Processes, "process_group", lambda self, device: nullcontext())
    for rank in (0, 1):
        two = teacher(model_folder).predictions(examples, tmp_path / "two", Processes(rank, 2), silent)
    assert all(torch.equal(two.of([e])[name], kept) for e in examples for name, kept in one.of([e]).items())


def test_what_a_teacher_has_not_read_is_an_error(model_folder: Path, examples: list[Example], tmp_path: Path) -> None:
    made = teacher(model_folder).predictions(examples[:1], tmp_path, Processes(), silent)
    with pytest.raises(StageError, match=r"finetune\.teacher: training draws an example that"):
        made.of(examples)


def test_a_full_disk_is_found_before_the_files_are_written(
    model_folder: Path, examples: list[Example], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    message = r"finetune\.teacher: predictions at \d+ labels need .*t: No space left on device; lower"
    with pytest.raises(StageError, match=message):
        teacher(model_folder).predictions(examples, tmp_path / "t", Processes(), silent)
    assert not (tmp_path / "t").exists()


def test_the_files_of_predictions_have_their_room_from_the_start(tmp_path: Path) -> None:
    teachers._prepare(tmp_path, 50_000, 258, 5)
    sizes = {name: (tmp_path / name).stat() for name in ("probabilities", "tokens")}
    assert {name: one.st_size for name, one in sizes.items()} == {"probabilities": 1_200_000, "tokens": 1_000_000}
    assert all(512 * one.st_blocks >= one.st_size for one in sizes.values())


def test_logits_that_are_not_finite(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, examples: list[Example], tmp_path: Path
) -> None:
    model.model.norm.weight.data.fill_(3e38)
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(StageError, match=r"finetune\.teacher: its logits are not finite; use float32"):
        teacher(tmp_path).predictions(examples, tmp_path / "t", Processes(), silent)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"a": 0, "b": 2}, "token 1 of the model is 'b', and T has it as 2 .1 of 2 tokens differ"),
        ({"a": 0, "c": 1}, "token 1 of the model is 'b', and T does not have it"),
        ({"a": 0, "b": 1, "c": 2}, None),  # it may know more
    ],
)
def test_tokens_must_be_the_same(theirs: dict[str, int], message: str | None) -> None:
    student, other = (SimpleNamespace(get_vocab=lambda ids=ids: ids) for ids in ({"a": 0, "b": 1}, theirs))
    if message is None:
        return check_same_tokens(student, other, Path("T"))
    with pytest.raises(StageError, match=rf"finetune\.teacher: {message}"):
        check_same_tokens(student, other, Path("T"))


# -- in the stage --------------------------------------------------------------------------------


def stage(raw: dict[str, Any], store: Path, scratch: Path, **section: Any) -> FinetuneStage:
    """The stage over a base without a step before it: another model than the teacher, with the same tokens."""
    raw = {key: raw[key] for key in ("schema", "name", "model", "finetune")}
    raw["finetune"] = raw["finetune"] | section
    plan = Orchestrator(Registry.discover(), store).plan(Recipe.parse(raw))
    scratch.mkdir(exist_ok=True)
    return FinetuneStage(StageInputs(plan, plan.step("finetune"), {}, scratch, "cpu"))


@pytest.fixture
def other_model(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """The tiny model with other layers, and the same embeddings."""
    folder = tmp_path / "other"
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_student_comes_to_predict_what_the_teacher_does(
    raw: dict[str, Any], other_model: Path, tmp_path: Path
) -> None:
    """Measured on logits, and not by the loss: of the distance from the teacher, most is gone."""
    words = {"teacher": {"model": str(other_model), "weight": 1.0}, "steps": 20, "learning_rate": 0.03}
    taught = stage(raw, tmp_path, tmp_path / "scratch", **words)
    student, teacher = taught.adapted, LlamaForCausalLM.from_pretrained(other_model)
    ids = torch.tensor([Tokenization(student.tokenizer, 64, "all").encode(RECORDS[:1]).examples[0].input_ids])

    def distance() -> float:
        with torch.no_grad():
            theirs, ours = (m(ids).logits.log_softmax(-1)[0, -3:] for m in (teacher, student.model.eval()))
        return float((theirs - ours).square().mean())

    before, report = distance(), taught.run()
    assert distance() < 0.5 * before
    assert report["kl_last"] < 0.5 * report["kl_first"] and report["loss_last"] == pytest.approx(report["kl_last"])
    lines = [json.loads(line) for line in (tmp_path / "scratch" / "log.jsonl").read_text().splitlines()]
    assert [line["kl"] for line in lines] == pytest.approx([line["loss"] for line in lines], rel=1e-5)


def test_a_student_that_is_its_teacher_is_as_far_as_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    report = stage(raw, tmp_path, tmp_path / "s", teacher="dense", steps=2).run()
    assert abs(report["kl_first"]) < 1e-6
    # Of 64 examples, in batches of 4: those of two steps, and of the one that is made ahead.
    assert report["teacher_forwards"] == 12


@pytest.mark.parametrize("words", [{"packing": True}, {"loss_chunk": 3}], ids=str)
def test_options_of_training_change_nothing_of_the_kl(
    words: dict[str, Any], raw: dict[str, Any], other_model: Path, tmp_path: Path
) -> None:
    """At the first step, before rounding differs; all examples are in it."""
    all_in_one = {"teacher": str(other_model), "steps": 1, "batch_size": 64}
    plain, other = (
        stage(raw, tmp_path, tmp_path / f"s{n}", **all_in_one, **more).run() for n, more in enumerate(({}, words))
    )
    assert other["kl_first"] == pytest.approx(plain["kl_first"], rel=1e-4) and plain["kl_first"] > 1e-3
    assert other["loss_first"] == pytest.approx(plain["loss_first"], rel=1e-5)


def test_a_killed_run_ends_as_a_whole_one(
    raw: dict[str, Any], other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {"teacher": str(other_model), "steps": 4, "save_every": 2}
    whole = stage(raw, tmp_path, tmp_path / "whole", **words)
    whole.run()
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "on_step_begin", killed_at(3))
        with pytest.raises(KeyboardInterrupt):
            stage(raw, tmp_path, tmp_path / "killed", **words).run()
    monkeypatch.setattr(teachers, "load_model", None)  # not loaded again
    again = stage(raw, tmp_path, tmp_path / "killed", **words)
    assert again.run()["resumed_from"] == "checkpoint-2"
    deltas = whole.adapted.deltas()
    assert all(torch.equal(deltas[name], value) for name, value in again.adapted.deltas().items())


def killed_at(step: int) -> Any:
    begin = Progress.on_step_begin

    def on_step_begin(self: Progress, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == step:
            raise KeyboardInterrupt
        begin(self, args, state, control, **kwargs)

    return on_step_begin


def test_the_teacher_is_gone_before_the_base_comes(
    raw: dict[str, Any], other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    load, build = teachers.load_model, finetune.build_adapted_model

    def load_model(spec: ModelSpec) -> Any:
        loaded = load(spec)
        models.append(weakref.ref(loaded[0]))
        return loaded

    def build_adapted_model(*args: Any) -> Any:
        assert [model() for model in models] == [None]
        return build(*args)

    monkeypatch.setattr(teachers, "load_model", load_model)
    monkeypatch.setattr(finetune, "build_adapted_model", build_adapted_model)
    stage(raw, tmp_path, tmp_path / "s", teacher=str(other_model), steps=1).run()


def test_files_of_predictions_are_mapped_and_no_copies(tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text(json.dumps({"labels": 3, "outcomes": 2, "tokens": 1}))
    first, second = (Predictions({}, tmp_path) for _ in range(2))
    first.probabilities.fill_(0.5)
    assert second.probabilities.eq(0.5).all() and (tmp_path / "probabilities").stat().st_size == 24
