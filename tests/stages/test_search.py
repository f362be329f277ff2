"""A search remembers what it evaluated, on disk; several processes share the records."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore

from sqft import Orchestrator, Recipe, Registry
from sqft.api import RankConfig, RankGroup, RecordValue, SearchSpace
from sqft.errors import ContractError, StageError
from sqft.stages.inputs import StageInputs
from sqft.stages.search import CachedEvaluator, SearchStage
from sqft.utils.distributed import Processes

SPACE = SearchSpace((RankGroup("a", (8, 4), ("l.0",)), RankGroup("b", (8, 4), ("l.1",))))
LARGE, SMALL = RankConfig((8, 8)), RankConfig((4, 4))
RECORDS: list[Any] = [{"text": str(number)} for number in range(10)]


Asked = list[tuple[RankConfig, int, int]]
Make = Callable[..., CachedEvaluator]


def value(config: RankConfig, record: int) -> RecordValue:
    return RecordValue(-sum(config.ranks) / 3 - record, 1 + record % 3)


def metric(config: RankConfig, samples: int) -> float:
    """The sum of totals over the sum of weights."""
    values = [value(config, record) for record in range(samples)]
    return sum(v.total for v in values) / sum(v.weight for v in values)


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
        return CachedEvaluator(tmp_path / "trials.jsonl", SPACE, records, measure, "searcher 'x' (here 1)")

    return make


def test_nothing_is_evaluated_twice(evaluator: Make, asked: Asked) -> None:
    evaluate = evaluator()
    assert evaluate(LARGE, 4) == evaluate(LARGE, 4) == pytest.approx(metric(LARGE, 4))
    assert evaluate(LARGE) == evaluate(LARGE, 10) == evaluate(LARGE, 99) == pytest.approx(metric(LARGE, 10))
    assert evaluate(LARGE, 2) == pytest.approx(metric(LARGE, 2))
    assert asked == [(LARGE, 0, 4), (LARGE, 4, 10)] and evaluate.trials == 2


@given(st.lists(st.tuples(st.sampled_from([LARGE, SMALL]), st.integers(1, 12) | st.none()), max_size=8))
def test_each_record_is_evaluated_once_in_whatever_portions(questions: list[tuple[RankConfig, int | None]]) -> None:
    """A subset that grows evaluates the new records only; a later run, with the file, evaluates nothing."""
    measured = Counter[tuple[RankConfig, int]]()

    def measure(config: RankConfig, records: slice) -> list[RecordValue]:
        measured.update((config, record) for record in range(records.start, records.stop))
        return [value(config, record) for record in range(records.start, records.stop)]

    with TemporaryDirectory() as folder:
        first = CachedEvaluator(Path(folder) / "t", SPACE, RECORDS, measure, "x")
        answers = [first.each(*question) for question in questions]
        again = CachedEvaluator(Path(folder) / "t", SPACE, RECORDS, measure, "x")
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


def test_a_line_that_a_kill_cut_short_is_dropped(evaluator: Make, asked: Asked, tmp_path: Path) -> None:
    first = evaluator()
    first(LARGE, 4), first(SMALL, 4), first(LARGE, 6)
    file = tmp_path / "trials.jsonl"
    complete = file.read_text()
    file.write_text(complete[:-9])
    again = evaluator()
    assert len(again.known[LARGE]) == 4 and file.read_text() == "".join(complete.splitlines(keepends=True)[:2])
    again(LARGE, 6)
    assert file.read_text() == complete
    assert [json.loads(line)["samples"] for line in complete.splitlines()] == [4, 4, 6]


def test_a_file_of_an_earlier_version_is_begun_anew(evaluator: Make, asked: Asked, tmp_path: Path) -> None:
    """It has a value for all samples together, and none for each."""
    (tmp_path / "trials.jsonl").write_text('{"ranks": [8, 8], "samples": 4, "value": 0.5}\n')
    evaluate = evaluator()
    assert evaluate.trials == 0 and (tmp_path / "trials.jsonl").read_text() == ""
    assert evaluate(LARGE, 4) == pytest.approx(metric(LARGE, 4)) and asked == [(LARGE, 0, 4)]


def test_no_file_without_an_evaluation(evaluator: Make, tmp_path: Path) -> None:
    evaluator()
    assert not list(tmp_path.iterdir())


def test_the_best_value_is_that_on_the_most_samples(evaluator: Make) -> None:
    evaluate = evaluator()
    evaluate(LARGE, 10)
    evaluate(LARGE, 4)
    assert evaluate.value_on_most_samples(LARGE) == pytest.approx(metric(LARGE, 10))
    assert evaluate.value_on_most_samples(SMALL) is None


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
    assert told == [{}] and report == expected | {"value": pytest.approx(expected["value"], rel=1e-5)}
    found = [json.loads(line) for line in (scratch / "trials.jsonl").read_text().splitlines()]
    assert len(found) == 3 and [trial["ranks"] for trial in found] == [trial["ranks"] for trial in alone]
    for one, other in zip(found, alone, strict=True):
        assert one["weights"] == other["weights"] and one["value"] == pytest.approx(other["value"], rel=1e-5)
        assert one["totals"] == pytest.approx(other["totals"], rel=1e-5)
