"""A search remembers what it evaluated, on disk; several processes share the records."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore

from sqft import Orchestrator, Recipe, Registry
from sqft.api import RankConfig, RankGroup, SearchSpace
from sqft.errors import ContractError, StageError
from sqft.stages.inputs import StageInputs
from sqft.stages.search import CachedEvaluator, SearchStage
from sqft.utils.distributed import Processes

SPACE = SearchSpace((RankGroup("a", (8, 4), ("l.0",)), RankGroup("b", (8, 4), ("l.1",))))
LARGE, SMALL = RankConfig((8, 8)), RankConfig((4, 4))
RECORDS: list[Any] = [{"text": str(number)} for number in range(10)]


@pytest.fixture
def asked() -> list[tuple[RankConfig, int]]:
    """What was evaluated: a configuration, and on how many records."""
    return []


@pytest.fixture
def evaluator(tmp_path: Path, asked: list[tuple[RankConfig, int]]) -> Callable[..., CachedEvaluator]:
    """A search's evaluator over one file, made anew with each call, as by a later run."""

    def measure(config: RankConfig, records: Sequence[Any]) -> float:
        assert records == RECORDS[: len(records)]
        asked.append((config, len(records)))
        return -sum(config.ranks) / 3 - len(records)

    def make(records: Sequence[Any] = RECORDS) -> CachedEvaluator:
        return CachedEvaluator(tmp_path / "trials.jsonl", SPACE, records, measure, "searcher 'x' (here 1)")

    return make


def test_nothing_is_evaluated_twice(
    evaluator: Callable[..., CachedEvaluator], asked: list[tuple[RankConfig, int]]
) -> None:
    evaluate = evaluator()
    assert evaluate(LARGE, 4) == evaluate(LARGE, 4) == -16 / 3 - 4
    assert evaluate(LARGE) == evaluate(LARGE, 10) == evaluate(LARGE, 99)  # all there are
    assert asked == [(LARGE, 4), (LARGE, 10)] and len(evaluate.known) == 2


def test_nor_by_a_later_run(evaluator: Callable[..., CachedEvaluator], asked: list[tuple[RankConfig, int]]) -> None:
    first = evaluator()
    values = first(LARGE, 4), first(SMALL, 4)
    again = evaluator()
    assert (again(LARGE, 4), again(SMALL, 4)) == values and len(asked) == 2
    again(SMALL)
    assert len(asked) == 3 and evaluator().known == again.known


def test_a_line_that_a_kill_cut_short_is_dropped(
    evaluator: Callable[..., CachedEvaluator], asked: list[tuple[RankConfig, int]], tmp_path: Path
) -> None:
    first = evaluator()
    first(LARGE, 4), first(SMALL, 4)
    file = tmp_path / "trials.jsonl"
    complete = file.read_text()
    file.write_text(complete[:-9])
    again = evaluator()
    assert list(again.known) == [(LARGE, 4)] and file.read_text() == complete.splitlines(keepends=True)[0]
    again(SMALL, 4)
    assert file.read_text() == complete
    assert [json.loads(line)["samples"] for line in complete.splitlines()] == [4, 4]


def test_no_file_without_an_evaluation(evaluator: Callable[..., CachedEvaluator], tmp_path: Path) -> None:
    evaluator()
    assert not list(tmp_path.iterdir())


def test_the_best_value_is_that_on_the_most_samples(evaluator: Callable[..., CachedEvaluator]) -> None:
    evaluate = evaluator()
    evaluate(LARGE, 10)
    evaluate(LARGE, 4)
    assert evaluate.value_on_most_samples(LARGE) == -16 / 3 - 10 and evaluate.value_on_most_samples(SMALL) is None


@pytest.mark.parametrize("samples", [0, -1, 2.0, True])
def test_samples_that_are_no_number_of_records(evaluator: Callable[..., CachedEvaluator], samples: Any) -> None:
    with pytest.raises(ContractError, match=rf"searcher 'x' \(here 1\) asked for an evaluation on {samples!r} samples"):
        evaluator()(LARGE, samples)


def test_a_configuration_outside_the_space(evaluator: Callable[..., CachedEvaluator]) -> None:
    with pytest.raises(ContractError, match="which is no configuration"):
        evaluator()(RankConfig((8, 5)))


def test_no_records_to_evaluate_on(evaluator: Callable[..., CachedEvaluator]) -> None:
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
    assert [trial["value"] for trial in found] == pytest.approx([trial["value"] for trial in alone], rel=1e-5)
