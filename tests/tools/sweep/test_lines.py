"""Lines of a sweep: which cells are points of one line, what is drawn of each, and what the caption says."""

from __future__ import annotations

import statistics
from typing import Any

import pytest

from sqft.tools.sweep.lines import Lines, axis_of_numbers, lines_of


def row(run: str, configuration: str, **more: Any) -> dict[str, Any]:
    return {"run": run, "seed": "0", "configuration": configuration, "accuracy": 0.5, "stderr": 0.1, **more}


def along(rows: list[dict[str, Any]], *axes: str, measure: str = "accuracy") -> Lines:
    return lines_of(rows, axes or ["steps"], "steps", measure)


def test_of_one_seed_the_error_is_the_measures_own() -> None:
    rows = [
        row("a", "merge", steps="1", **{"arc acc": 0.3, "arc acc_stderr": 0.02}),
        row("b", "merge", steps="2", **{"arc acc": 0.4, "arc acc_stderr": None}),
    ]
    task, accuracy = along(rows, measure="arc acc"), along(rows)
    assert task.bars() == {"merge": [(1, 0.3, 0.02), (2, 0.4, 0.0)]}
    assert task.caption() == "Of merge. One seed, with the standard error of the measure where it is known."
    assert accuracy.bars() == {"merge": [(1, 0.5, 0.1), (2, 0.5, 0.1)]}
    assert accuracy.caption() == "Of merge. One seed, with the standard error of the measure."
    assert along([one | {"perplexity": 9.0} for one in rows], measure="perplexity").caption().endswith("not known.")


def test_bars_are_of_one_kind() -> None:
    """Where a seed failed, the other one's standard error is not drawn among deviations over seeds."""
    rows = [
        row("a", "merge", steps="1", accuracy=0.25),
        row("b", "merge", steps="1", seed="1", accuracy=0.75),
        row("c", "merge", steps="2"),
    ]
    lines = along(rows, "steps", "seed")
    assert lines.bars() == {"merge": [(1, 0.5, statistics.stdev([0.25, 0.75])), (2, 0.5, 0.0)]}
    assert "over 1 to 2 seeds, with their standard deviation (none for a single seed)" in lines.caption()
    assert "Means over 2 seeds, with their standard deviation." in along(rows[:2], "steps", "seed").caption()


def test_a_line_is_of_one_configuration() -> None:
    """Of the one that most cells have, though one cell has a later model; what has none of it is named."""
    rows = [
        row("a", "search (racing)", steps="1", accuracy=0.1),
        row("a", "merge", steps="1", accuracy=0.9),
        row("b", "search (racing)", steps="2", accuracy=0.2),
        row("c", "sparsify", steps="3", accuracy=0.8),
    ]
    lines = along(rows)
    assert lines.bars() == {"search (racing)": [(1, 0.1, 0.1), (2, 0.2, 0.1)]}
    assert lines.caption().endswith("Not drawn: steps 3.")


def test_of_equally_frequent_ones_the_last_made_is_drawn() -> None:
    rows = [
        row("a", "merge", steps="1", accuracy=None),
        row("a", "finetune:maximal", steps="1", accuracy=0.25),
        row("a", "finetune:minimal", steps="1", accuracy=0.125),
        row("a", "sparsify", steps="1", accuracy=0.75),
    ]
    assert along(rows).bars() == {"finetune:minimal": [(1, 0.125, 0.1)]}


def test_values_that_are_no_numbers_are_named() -> None:
    rows = [row(bits, "quantize", steps=bits, adapter="NLS") for bits in ("4", "8", "null", "nan", "inf")]
    lines = along(rows, "adapter", "steps")
    assert [point.x for point in lines.points["NLS: quantize"]] == [4, 8]
    assert lines.caption().endswith("Not drawn: NLS, steps null; NLS, steps nan; NLS, steps inf.")


def test_cells_are_told_apart_by_what_was_written() -> None:
    """1e2 is the place of 100, and still another cell."""
    rows = [row("a", "merge", steps="100"), row("b", "merge", steps="1e2"), row("c", "merge", steps="7")]
    assert [(point.x, len(point.values)) for point in along(rows).points["merge"]] == [(7, 1), (100, 1), (100, 1)]


@pytest.mark.parametrize(
    ("axes", "found"),
    [
        ({"steps": "12", "sparsify.sparsity": "57"}, "sparsify.sparsity"),
        ({"steps": "12", "sparsify.sparsity": "55"}, "steps"),
        ({"adapter": "ab", "seed": "01"}, None),
    ],
)
def test_the_axis_to_draw_along(axes: dict[str, str], found: str | None) -> None:
    rows = [dict(zip(axes, values, strict=True)) for values in zip(*axes.values(), strict=True)]
    assert axis_of_numbers(rows, [*axes]) == found


def test_what_is_not_finite_is_no_number() -> None:
    assert axis_of_numbers([{"a": value} for value in ("1", "nan", "inf")], ["a"]) is None
