"""Models compared on the same items."""

from __future__ import annotations

import copy
import dataclasses
import math
from pathlib import Path

import pytest

from sqft.execution.run import Run
from sqft.tools.run_report.comparison import Comparison, compare_answers, comparisons
from sqft.tools.run_report.facts import read_facts


def test_one_run_compares_its_last_model_with_all_others(made: tuple[Run, Run], made_store: Path) -> None:
    found = list(comparisons([read_facts(made[0].folder, made_store)]))
    others = ["model", "sparsify", "finetune:maximal", "search"]
    assert [one.first for one in found if one.measure == "accuracy"] == others
    assert {one.second for one in found} == {"merge"}
    by_search = [one for one in found if one.first == "search"]
    assert all(one.difference == pytest.approx(0, abs=1e-6) and not one.differs for one in by_search)
    rows = {row["configuration"].partition(" ")[0]: row for row in made[0].report["rows"]}
    for one in found:
        before, after = rows[one.first], rows["merge"]
        if one.measure == "accuracy":
            assert one.items == 10 and one.difference == pytest.approx(after["accuracy"] - before["accuracy"])
        else:
            assert one.difference == pytest.approx(after["perplexity"] / before["perplexity"] - 1)
            assert one.interval[0] <= one.difference <= one.interval[1]


def test_several_runs_are_compared_with_the_first(made: tuple[Run, Run], made_store: Path) -> None:
    first, second = (read_facts(run.folder, made_store) for run in made)
    found = [one for one in comparisons([first, second]) if one.measure == "perplexity"]
    assert [one.first for one in found] == [f"{first.name}: {name}" for name in first.configurations()]
    assert [one.second for one in found] == [f"{second.name}: {name}" for name in second.configurations()]
    rows = [{row["configuration"]: row for row in run.report["rows"]} for run in made]
    sparsify = next(one for one in found if one.first.endswith("sparsify"))
    assert sparsify.difference == pytest.approx(
        rows[1]["sparsify"]["perplexity"] / rows[0]["sparsify"]["perplexity"] - 1
    )


def test_only_what_was_measured_under_the_same_rules_is_compared(made: tuple[Run, Run], made_store: Path) -> None:
    """Another text, answers graded otherwise, and a record of an earlier sqft, which does not know its texts."""
    first, second = (read_facts(run.folder, made_store) for run in made)
    roles = {step: dict.fromkeys(digests, "another") for step, digests in second.digests.items()}
    other_text = dataclasses.replace(second, digests=roles)
    assert {one.measure for one in comparisons([first, other_text])} == {"accuracy"}
    assert {one.measure for one in comparisons([first, dataclasses.replace(second, digests={})])} == {"accuracy"}
    graded = copy.deepcopy(dict(second.recipe))
    graded["evaluate"]["exact_match"]["max_new_tokens"] = 9
    assert {one.measure for one in comparisons([first, dataclasses.replace(second, recipe=graded)])} == {"perplexity"}


def test_few_answers_that_differ_are_no_difference() -> None:
    """Four answers that only one model has right: no interval of draws has 0, and yet p is 0.125."""
    found = compare_answers({str(n): 0.0 for n in range(200)}, {str(n): float(n < 4) for n in range(200)})
    assert found is not None and found[2][0] > 0 and found[5] == 0.125
    assert not Comparison("a", "b", "accuracy", *found).differs


def test_right_and_wrong_answers() -> None:
    before = {"a": 1.0, "b": 1.0, "c": 0.0, "d": 0.0, "only before": 1.0}
    after = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 1.0, "only after": 1.0}
    found = compare_answers(before, after)
    assert found is not None
    items, mean, interval, only_first, only_second, p = found
    assert (items, mean, only_first, only_second, p) == (4, 0.25, 1, 2, 1.0)
    assert interval[0] <= mean <= interval[1]


def test_other_scores_have_no_test() -> None:
    found = compare_answers({"a": 0.5, "b": 0.25}, {"a": 0.75, "b": 0.5})
    assert found is not None and found[1] == 0.25 and found[3:] == (None, None, None)


def test_nothing_in_common() -> None:
    assert compare_answers({"a": 1.0}, {"b": 1.0}) is None


def test_a_clear_difference_is_one() -> None:
    items = [str(n) for n in range(100)]
    found = compare_answers(dict.fromkeys(items, 0.0), {item: float(int(item) < 40) for item in items})
    assert found is not None and found[2][0] > 0.25 and found[5] == pytest.approx(2 * math.pow(2, -40))
