"""Trials of a search: each configuration once, with the error of its value, by its number of records."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqft_search.racing import Racing

from sqft.api import RankConfig, RankGroup, RecordValue, SearchSpace
from sqft.stages.search import CachedEvaluator
from sqft.tools.run_report.trials import CHOSEN, MOST_LINES, Trial, by_records, in_order, read_trials


def line(ranks: list[int], samples: int, totals: list[float], weights: list[int], value: float) -> dict[str, object]:
    return {"ranks": ranks, "samples": samples, "value": value, "totals": totals, "weights": weights}


LINES = [
    line([8], 2, [1.0, 0.0], [1, 1], 0.5),
    line([4], 2, [0.0, 0.0], [1, 1], 0.0),
    line([8], 4, [1.0, 1.0], [1, 1], 0.75),
]


def test_lines_of_a_configuration_are_one_trial() -> None:
    first, second = read_trials(LINES)
    assert (first.ranks, first.records, first.value) == ((8,), 4, 0.75)
    assert first.error == pytest.approx(statistics.stdev([1, 0, 1, 1]) / math.sqrt(4))
    assert (second.ranks, second.records, second.value, second.error) == ((4,), 2, 0.0, 0.0)
    assert by_records([first, second], [8]) == {
        "2 records": [(2, 0.0, 0.0)], "chosen: 4 records": [(1, 0.75, first.error)]
    }  # fmt: skip


def test_a_single_record_and_an_earlier_version_have_no_error() -> None:
    """And a record without labels has no value of its own."""
    single = line([8], 1, [0.5], [1], 0.5)
    assert [trial.error for trial in read_trials([single, {"ranks": [4], "samples": 9, "value": 1}])] == [0, 0]
    assert read_trials([line([8], 3, [-1.0, 0.0, -4.0], [1, 0, 2], -5 / 3)])[0].error > 0


def test_the_best_so_far() -> None:
    trials = read_trials([line([n], 1, [v], [1], v) for n, v in enumerate((0.25, 0.5, 0.0))])
    assert in_order(trials)["best so far"] == [(1, 0.25), (2, 0.5), (3, 0.5)]


def test_many_numbers_of_records_share_labels() -> None:
    """Between powers of two; where these are still too many, of four, and so on."""
    trials = read_trials([line([n], n, [], [], 0.5) for n in (1, 2, 3, 5, 8, 15, 16)])
    assert {label: [x for x, *_ in points] for label, points in by_records(trials, []).items()} == {
        "1 record": [1], "2 to 3 records": [2, 3], "4 to 7 records": [4],
        "8 to 15 records": [5, 6], "16 to 31 records": [7],
    }  # fmt: skip
    trials = read_trials([line([n], 1 << n, [], [], 0.5) for n in range(12)])
    assert {label: [x for x, *_ in points] for label, points in by_records(trials, [0]).items()} == {
        "1 to 3 records": [2], "4 to 15 records": [3, 4], "16 to 63 records": [5, 6],
        "64 to 255 records": [7, 8], "256 to 1,023 records": [9, 10], "1,024 to 4,095 records": [11, 12],
        "chosen: 1 record": [1],
    }  # fmt: skip


def test_the_chosen_one_needs_no_line_of_the_others() -> None:
    trials = read_trials([line([n], n, [], [], 0.5) for n in (1, 2, 3, 4, 5, 6, 7)])
    assert [*by_records(trials, [7])] == ["1 record", *(f"{n} records" for n in range(2, 7)), "chosen: 7 records"]


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=40))
def test_there_are_never_more_lines_than_the_legend_takes(counts: list[int]) -> None:
    points = by_records([Trial((place,), count, 0.5, 0.0) for place, count in enumerate(counts)], [0])
    assert len([label for label in points if not label.startswith(CHOSEN)]) <= MOST_LINES
    assert sum(map(len, points.values())) == len(counts)


def test_of_a_race_every_configuration_is_there(tmp_path: Path) -> None:
    """What a real race left on disk: as many records in all as it evaluated."""
    space = SearchSpace(tuple(RankGroup(name, (8, 6, 4), (name,), cost=1) for name in "abc"))

    def measure(config: RankConfig, records: slice) -> list[RecordValue]:
        draws = (Random(f"{config} {record}").random() for record in range(records.start, records.stop))
        return [RecordValue(draw, 1) for draw in draws]

    evaluate = CachedEvaluator(tmp_path / "t", space, [{}] * 99, measure, "x", list, lambda samples: [])
    chosen = Racing(first=2, evaluations=200).search(space, evaluate, Random(3))
    trials = read_trials(json.loads(text) for text in (tmp_path / "t").read_text().splitlines())
    assert {t.ranks: t.records for t in trials} == {c.ranks: len(v) for c, v in evaluate.known.items()}
    assert len({t.records for t in trials}) > 1
    points = by_records(trials, chosen.ranks)
    assert sorted(x for own in points.values() for x, *_ in own) == list(range(1, len(trials) + 1))
    assert list(points)[-1] == f"chosen: {len(evaluate.known[chosen])} records"
