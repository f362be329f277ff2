"""A search remembers what it evaluated, on disk; several processes share the records."""

from __future__ import annotations

import json
import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqft_nls.searchers import HillClimbing
from sqft_search.evolutionary import Evolutionary
from sqft_search.importance import Importance
from sqft_search.loss_guided import LossGuided
from sqft_search.racing import Racing
from torch.distributed import HashStore

from sqft import Orchestrator, Recipe, Registry
from sqft.api import Evaluate, RankConfig, RankGroup, RecordValue, Searcher, SearchSpace, TrainingStep
from sqft.errors import ContractError, StageError
from sqft.execution.run import Run
from sqft.modeling.adapters.saving import read_ranks, space_from
from sqft.stages.adapted import training_steps
from sqft.stages.inputs import StageInputs
from sqft.stages.search import NO_MORE, CachedEvaluator, SearchStage
from sqft.utils.distributed import Processes

SPACE = SearchSpace((RankGroup("a", (8, 4), ("l.0",)), RankGroup("b", (8, 4), ("l.1",))))
LARGE, SMALL = RankConfig((8, 8)), RankConfig((4, 4))
WORK = "checkpoints/trials.jsonl"
"""Of a search that goes on."""
RECORDS: list[Any] = [{"text": str(number)} for number in range(10)]
CHANGES = [[0.0, 0.5], [0.0, -1.0]]


Asked = list[tuple[RankConfig, int, int]]
Make = Callable[..., CachedEvaluator]


def value(config: RankConfig, record: int) -> RecordValue:
    return RecordValue(-sum(config.ranks) / 3 - record, 1 + record % 3)


def metric(config: RankConfig, samples: int) -> float:
    """The sum of totals over the sum of weights."""
    values = [value(config, record) for record in range(samples)]
    return sum(v.total for v in values) / sum(v.weight for v in values)


def changes(samples: int | None) -> list[list[float]]:
    return CHANGES if samples == 3 else []


@pytest.fixture
def asked() -> Asked:
    """What was evaluated: a configuration, and from which record up to which."""
    return []


@pytest.fixture
def evaluator(tmp_path: Path, asked: Asked) -> Make:
    """A search's evaluator over one file, made anew with each call, as by a later run."""

    def measure(config: RankConfig, records: slice) -> list[RecordValue]:
        asked.append((config, records.start, records.stop))
        return [value(config, record) for record in range(records.start, records.stop)]

    def make(records: Sequence[Any] = RECORDS) -> CachedEvaluator:
        return CachedEvaluator(tmp_path / WORK, SPACE, records, measure, "searcher 'x' (here 1)", list, changes)

    return make


def test_nothing_is_evaluated_twice(evaluator: Make, asked: Asked) -> None:
    evaluate = evaluator()
    assert evaluate(LARGE, 4) == evaluate(LARGE, 4) == pytest.approx(metric(LARGE, 4))
    assert evaluate(LARGE) == evaluate(LARGE, 10) == evaluate(LARGE, 99) == pytest.approx(metric(LARGE, 10))
    assert evaluate(LARGE, 2) == pytest.approx(metric(LARGE, 2))
    assert asked == [(LARGE, 0, 4), (LARGE, 4, 10)] and len(evaluate.trials) == 2


@given(st.lists(st.tuples(st.sampled_from([LARGE, SMALL]), st.integers(1, 12) | st.none()), max_size=8))
def test_each_record_is_evaluated_once_in_whatever_portions(questions: list[tuple[RankConfig, int | None]]) -> None:
    """A subset that grows evaluates the new records only; a later run, with the file, evaluates nothing."""
    measured = Counter[tuple[RankConfig, int]]()

    def measure(config: RankConfig, records: slice) -> list[RecordValue]:
        measured.update((config, record) for record in range(records.start, records.stop))
        return [value(config, record) for record in range(records.start, records.stop)]

    with TemporaryDirectory() as folder:
        first = CachedEvaluator(Path(folder) / "t", SPACE, RECORDS, measure, "x", list, changes)
        answers = [first.each(*question) for question in questions]
        again = CachedEvaluator(Path(folder) / "t", SPACE, RECORDS, measure, "x", list, changes)
        assert [again.each(*question) for question in questions] == answers and again.trials == first.trials
    for (config, samples), answer in zip(questions, answers, strict=True):
        assert answer == [value(config, record) for record in range(min(samples or 10, 10))]
    asked = {(config, record) for config, samples in questions for record in range(min(samples or 10, 10))}
    assert measured == dict.fromkeys(asked, 1)


def test_nor_by_a_later_run(evaluator: Make, asked: Asked) -> None:
    first = evaluator()
    values = first(LARGE, 4), first(SMALL, 4)
    again = evaluator()
    assert (again(LARGE, 4), again(SMALL, 4)) == values and len(asked) == 2
    again(SMALL)
    assert asked[2:] == [(SMALL, 4, 10)] and evaluator().known == again.known


def test_the_time_of_evaluations_is_known_to_a_later_run(
    evaluator: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the same answers for the same questions, however fast it reads them."""
    clock = iter([0.0, 2.0, 10.0, 13.0, 20.0, 21.0, 30.0, 34.0])
    monkeypatch.setattr("sqft.stages.search.time.monotonic", lambda: next(clock))
    questions = [(LARGE, 4), (SMALL, 4), (LARGE, 2), (LARGE, 6)]
    first = evaluator()
    assert first.within(0.1) and first.within(None)
    answers = [(first(*question), first.within(5), first.within(5.1)) for question in questions]
    assert [answer[1:] for answer in answers] == [(True, True), (False, True), (False, True), (False, False)]
    again = evaluator()
    assert again.within(0.1)
    assert [(again(*question), again.within(5), again.within(5.1)) for question in questions] == answers
    assert not again.within(6) and again.within(6.1)
    again(LARGE)
    assert not again.within(10) and again.within(10.1)
    again.write(tmp_path / "trials.jsonl")
    assert "seconds" not in (tmp_path / "trials.jsonl").read_text()


def test_a_line_that_a_kill_cut_short_is_dropped(evaluator: Make, asked: Asked, tmp_path: Path) -> None:
    first = evaluator()
    first(LARGE, 4), first(SMALL, 4), first(LARGE, 6)
    file = tmp_path / WORK
    complete = file.read_text()
    file.write_text(complete[:-9])
    again = evaluator()
    assert len(again.known[LARGE]) == 4 and file.read_text() == "".join(complete.splitlines(keepends=True)[:2])
    again(LARGE, 6)
    assert again.trials == first.trials == evaluator().trials
    assert [trial["samples"] for trial in again.trials] == [4, 4, 6]


def test_a_file_of_an_earlier_version_is_begun_anew(evaluator: Make, asked: Asked, tmp_path: Path) -> None:
    """It has no seconds."""
    (tmp_path / WORK).parent.mkdir()
    (tmp_path / WORK).write_text('{"ranks": [8, 8], "samples": 1, "value": 0.5, "totals": [0.5], "weights": [1]}\n')
    evaluate = evaluator()
    assert evaluate.trials == [] and (tmp_path / WORK).read_text() == ""
    assert evaluate(LARGE, 4) == pytest.approx(metric(LARGE, 4)) and asked == [(LARGE, 0, 4)]


def test_no_file_without_an_evaluation(evaluator: Make, tmp_path: Path) -> None:
    evaluator().write(tmp_path / "trials.jsonl")
    assert not list(tmp_path.iterdir())


def test_the_best_value_is_that_on_the_most_samples(evaluator: Make) -> None:
    evaluate = evaluator()
    evaluate(LARGE, 10)
    evaluate(LARGE, 4)
    assert evaluate.value_on_most_samples(LARGE) == pytest.approx(metric(LARGE, 10))
    assert evaluate.value_on_most_samples(SMALL) is None


def test_the_front_is_what_nothing_smaller_reaches(tmp_path: Path) -> None:
    """Beside all pairs; what was evaluated on fewer samples is not compared."""
    ranks = (4, 3, 2, 1)
    space = SearchSpace((RankGroup("a", ranks, ("l.0",), cost=3), RankGroup("b", ranks, ("l.1",), cost=5)))
    quality = {RankConfig(pair): float(draw) for pair, draw in zip(product(ranks, ranks), [*range(8)] * 2, strict=True)}

    def measure(config: RankConfig, part: slice) -> list[RecordValue]:
        return [RecordValue(quality[config], 1)] * (part.stop - part.start)

    evaluate = CachedEvaluator(tmp_path / "t", space, RECORDS, measure, "x", list, changes)
    few = [RankConfig((1, 1)), RankConfig((4, 4))]
    for config in quality:
        evaluate(config, 1 if config in few else None)
    full = [config for config in quality if config not in few]

    def beaten(config: RankConfig) -> bool:
        size = space.parameters(config)
        return any(
            c != config
            and space.parameters(c) <= size
            and quality[c] >= quality[config]
            and (space.parameters(c), -quality[c]) != (size, -quality[config])
            for c in full
        )

    expected = {(space.parameters(config), quality[config]) for config in full if not beaten(config)}
    front = evaluate.front(full[0])
    assert [(point["parameters"], point["value"]) for point in front] == sorted(expected)
    assert all(quality[RankConfig(tuple(point["ranks"]))] == point["value"] for point in front)


@pytest.mark.parametrize("samples", [0, -1, 2.0, True])
def test_samples_that_are_no_number_of_records(evaluator: Make, samples: Any) -> None:
    with pytest.raises(ContractError, match=rf"searcher 'x' \(here 1\) asked for an evaluation on {samples!r} samples"):
        evaluator()(LARGE, samples)


def test_a_configuration_outside_the_space(evaluator: Make) -> None:
    with pytest.raises(ContractError, match="which is no configuration"):
        evaluator()(RankConfig((8, 5)))


def test_no_records_to_evaluate_on(evaluator: Make) -> None:
    with pytest.raises(StageError, match=r"asked for an evaluation, but search.data is not given"):
        evaluator([])(LARGE)
    with pytest.raises(StageError, match=r"asked for gradients, but search.data is not given"):
        evaluator([]).first_order(3)
    with pytest.raises(ContractError, match=r"asked for gradients on 0 samples"):
        evaluator().first_order(0)
    assert evaluator().first_order(3) == CHANGES


@pytest.mark.parametrize(
    "searcher",
    [HillClimbing(samples=6), Racing(first=2, evaluations=40), Evolutionary(samples=6, evaluations=40, population=2)],
    ids=lambda searcher: str(searcher.name),
)
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_search_that_was_killed_goes_on(searcher: Searcher, kept: int, tmp_path: Path) -> None:
    """After `kept` trials and half of the next: it ends alike, and measures what is missing."""
    space = SearchSpace(tuple(RankGroup(name, (8, 6, 4), (name,), cost=1) for name in "abc"))
    measured = 0

    def measure(config: RankConfig, records: slice) -> list[RecordValue]:
        nonlocal measured
        measured += records.stop - records.start
        draws = (Random(f"{config} {record}").random() for record in range(records.start, records.stop))
        return [RecordValue(draw, 1) for draw in draws]

    def search() -> RankConfig:
        evaluate = CachedEvaluator(tmp_path / WORK, space, RECORDS, measure, "x", list, changes)
        found = searcher.search(space, evaluate, Random(3))
        evaluate.write(tmp_path / "trials.jsonl")
        return found

    found, file, all_measured = search(), tmp_path / WORK, measured
    complete = (tmp_path / "trials.jsonl").read_text()
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:kept]) + lines[kept][:20])
    measured = 0
    assert search() == found and (tmp_path / "trials.jsonl").read_text() == complete
    before = sum(len(json.loads(line)["totals"]) for line in lines[:kept])
    assert measured == all_measured - before


def test_ranks_by_importance_in_a_search_and_without_one(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """The searcher gets what the trained deltas lose, and `evaluate` measures the same ranks."""
    raw["search"]["searcher"] = "importance"
    raw["evaluate"]["of"] = ["finetune:importance", "search"]
    orchestrator = Orchestrator(registry, tmp_path)
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    report = run["search"].report
    assert (report["trials"], report["records"], report["front"]) == (0, 0, [])
    space = space_from(json.loads((run["finetune"].folder / "space.json").read_text()))
    ranks = read_ranks(run["search"].folder)
    assert ranks in space and report["trainable"] <= run["evaluate:finetune:importance"].report["trainable"]
    rows = {row["configuration"]: row for row in run.report["rows"]}
    assert len({row["trainable"] for row in rows.values()}) == len({row["perplexity"] for row in rows.values()}) == 1


def test_the_steps_of_training_in_a_search_and_without_one(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sequence[TrainingStep]] = []

    def search(self: LossGuided, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        seen.append(evaluate.training())
        return self.heuristic(space)

    monkeypatch.setattr(LossGuided, "search", search)
    raw["search"]["searcher"] = "loss-guided"
    raw["evaluate"]["of"] = ["finetune:loss-guided", "search"]
    orchestrator = Orchestrator(registry, tmp_path)
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)))
    steps = training_steps(run["finetune"].folder)
    assert len(steps) == run["finetune"].report["steps"] and seen == [steps, steps]


BY_GRADIENT = {"name": "importance", "options": {"signal": "gradient", "samples": 5}}


@pytest.fixture
def by_gradient(
    raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> tuple[Run, Callable[[Path, Processes], SearchStage]]:
    """A search by gradients; and another one, after the same training, in a folder and one of several processes."""
    raw["search"]["searcher"] = BY_GRADIENT
    orchestrator = Orchestrator(registry, tmp_path)
    plan = orchestrator.plan(Recipe.parse(raw))
    run = orchestrator.run(plan, until="search")
    folders = {"finetune": run["finetune"].folder, "base": run["sparsify"].folder}

    def stage(scratch: Path, processes: Processes) -> SearchStage:
        return SearchStage(StageInputs(plan, plan.step("search"), folders, scratch, "cpu", processes=processes))

    return run, stage


def test_ranks_by_gradients(by_gradient: tuple[Run, Callable[..., SearchStage]], tmp_path: Path) -> None:
    """Nothing is evaluated. Of all configurations as cheap, none loses less; trained deltas are left as they are."""
    run, make = by_gradient
    report, stage = run["search"].report, make(tmp_path, Processes())
    assert (report["trials"], report["value"], report["front"]) == (0, None, [])
    space, ranks = stage.adapted.measured_space(), read_ranks(run["search"].folder)
    before = {name: value.clone() for name, value in stage.adapted.deltas().items()}
    found = stage._differentiate(5)
    assert all(value.equal(before[name]) for name, value in stage.adapted.deltas().items())
    assert all(group[0] == 0 and all(group[1:]) for group in found)

    def lost(config: RankConfig) -> float:
        by_group = zip(space.groups, found, config.ranks, strict=True)
        return sum(group[one.ranks.index(rank)] for one, group, rank in by_group)

    budget = space.parameters(space.choice(space.median()))
    every = (RankConfig(config) for config in product(*(group.ranks for group in space.groups)))
    assert lost(ranks) == pytest.approx(min(lost(config) for config in every if space.parameters(config) <= budget))


def test_gradients_are_of_the_metric_loss(by_gradient: tuple[Run, Callable[..., SearchStage]], tmp_path: Path) -> None:
    """Half-way between a group's largest rank and a smaller one, values change by about half of what is foreseen."""
    _, make = by_gradient
    stage = make(tmp_path, Processes())
    space, found = stage.adapted.space, stage._differentiate(5)

    def loss() -> float:
        values = stage._measure(largest, slice(5))
        return -sum(v.total for v in values) / sum(v.weight for v in values)

    largest = RankConfig(tuple(group.ranks[0] for group in space.groups))
    before = loss()
    for group, own in zip(space.groups, found, strict=True):
        factors = [stage.adapted.layers[name].delta.B.data for name in group.members]  # type: ignore[attr-defined]
        kept = [B.clone() for B in factors]
        for B in factors:
            B[:, group.ranks[-1] :] *= 0.5
        assert loss() - before == pytest.approx(own[-1] / 2, rel=0.2, abs=1e-6)
        for B, was in zip(factors, kept, strict=True):
            B.copy_(was)


@pytest.mark.parametrize("samples", [5, 1])
def test_processes_share_the_gradients(
    by_gradient: tuple[Run, Callable[..., SearchStage]], samples: int, tmp_path: Path
) -> None:
    """Of a single record, the second process has none."""
    _, make = by_gradient
    alone, store = make(tmp_path, Processes())._differentiate(samples), HashStore()
    other = threading.Thread(target=make(tmp_path, Processes(1, 2, store)).run)
    other.start()
    first = make(tmp_path, Processes(0, 2, store))
    found = first._differentiate(samples)
    first.inputs.processes.broadcast(NO_MORE)
    other.join(60)
    for one, both in zip(alone, found, strict=True):
        assert both == pytest.approx(one, rel=1e-4, abs=1e-7)


def test_logits_are_in_memory_as_in_training(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    """As many labels at a time, for gradients and for values."""
    raw["search"]["searcher"], raw["finetune"]["loss_chunk"] = BY_GRADIENT, 2
    orchestrator = Orchestrator(registry, tmp_path)
    plan = orchestrator.plan(Recipe.parse(raw))
    run = orchestrator.run(plan, until="finetune")
    folders = {"finetune": run["finetune"].folder, "base": run["sparsify"].folder}
    stage = SearchStage(StageInputs(plan, plan.step("search"), folders, tmp_path / "scratch", "cpu"))
    rows: list[int] = []
    head = stage.adapted.model.get_output_embeddings()
    head.register_forward_hook(lambda module, given, logits: rows.append(logits.numel() // logits.shape[-1]))
    stage._differentiate(5)
    assert max(rows) == 2
    rows.clear()
    stage._measure(RankConfig(tuple(group.ranks[0] for group in stage.adapted.space.groups)), slice(5))
    assert max(rows) == 2


def test_gradients_that_are_not_finite(
    by_gradient: tuple[Run, Callable[..., SearchStage]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite with one sign in one process, and with the other in another: they have no sum."""
    shares = [json.dumps([[[0.0, sign * math.inf]], 3]) for sign in (1, -1)]
    monkeypatch.setattr(Processes, "gather", lambda self, own: shares)
    with pytest.raises(StageError, match="the gradients of the loss are not finite"):
        by_gradient[1](tmp_path, Processes())._differentiate(5)


def test_gradients_that_were_not_announced(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan has not counted their memory."""
    raw["search"]["searcher"] = BY_GRADIENT
    monkeypatch.setattr(Importance, "needs_gradients", lambda self: False)
    monkeypatch.setattr(Importance, "search", lambda self, space, evaluate, rng: evaluate.first_order())
    orchestrator = Orchestrator(registry, tmp_path)
    with pytest.raises(ContractError, match=r"'importance' .* asked for gradients, but its needs_gradients"):
        orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until="search")


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
def test_a_loss_is_measured_on_what_training_would_keep(
    metric: str, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    lines = [{"prompt": "a" * length, "completion": "b"} for length in (4, 20, 5, 30, 6)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    raw["finetune"] |= {"max_length": 10, "truncation": "drop"}
    raw["search"] |= {"data": str(tmp_path / "mixed.jsonl"), "metric": metric, "max_new_tokens": 1}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until="search")
    trials = [json.loads(line) for line in (run["search"].folder / "trials.jsonl").read_text().splitlines()]
    assert trials and {trial["samples"] for trial in trials} == {3 if metric == "loss" else 5}


@pytest.mark.parametrize(("tolerance", "right"), [(0, 0), (1, 1)])
def test_answers_are_right_within_the_tolerance(
    tolerance: float, right: float, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """A model that has learnt to answer 7, where 8 is expected."""
    for name, number in ("learnt", 7), ("asked", 8):
        record = {"prompt": "a", "completion": f" {number}"}
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(record) + "\n") * 4)
    raw["finetune"] |= {"data": str(tmp_path / "learnt.jsonl"), "steps": 20}
    asked = {"metric": "exact_match", "answer": "first_number", "tolerance": tolerance, "max_new_tokens": 2}
    raw["search"] |= {"data": str(tmp_path / "asked.jsonl"), **asked}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    run = orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until="search")
    trials = [json.loads(line) for line in (run["search"].folder / "trials.jsonl").read_text().splitlines()]
    assert trials and {trial["value"] for trial in trials} == {right}


@pytest.mark.parametrize("metric", ["loss", "exact_match"])
@pytest.mark.parametrize("samples", [7, 1])
def test_processes_share_the_records_and_find_what_one_finds(
    metric: str, samples: int, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    """Shares of four and three records; of a single one, the second process has none."""
    raw["search"] |= {"metric": metric, "max_new_tokens": 4} if metric == "exact_match" else {}
    raw["search"]["searcher"]["options"]["samples"] = samples
    orchestrator = Orchestrator(registry, tmp_path)
    plan = orchestrator.plan(Recipe.parse(raw))
    run = orchestrator.run(plan, until="search")
    alone = [json.loads(line) for line in (run["search"].folder / "trials.jsonl").read_text().splitlines()]
    folders = {"finetune": run["finetune"].folder, "base": run["sparsify"].folder}
    step, store, scratch = plan.step("search"), HashStore(), tmp_path / "together"
    scratch.mkdir()

    def stage(rank: int) -> SearchStage:
        return SearchStage(StageInputs(plan, step, folders, scratch, "cpu", processes=Processes(rank, 2, store)))

    told: list[object] = []
    other = threading.Thread(target=lambda: told.append(stage(1).run()))
    other.start()
    report = stage(0).run()
    other.join(60)
    expected = run["search"].report
    assert told == [{}] and report | {"front": ...} == expected | {
        "value": pytest.approx(expected["value"], rel=1e-5),
        "front": ...,
    }
    found = [json.loads(line) for line in (scratch / "trials.jsonl").read_text().splitlines()]
    assert len(found) == 3 and [trial["ranks"] for trial in found] == [trial["ranks"] for trial in alone]
    for one, other in zip(found, alone, strict=True):
        assert one["weights"] == other["weights"] and one["value"] == pytest.approx(other["value"], rel=1e-5)
        assert one["totals"] == pytest.approx(other["totals"], rel=1e-5)
