"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqft.planning.estimates import Estimate
from sqft.utils.text import human_size

HEADS = ("STEP", "", "COMPONENTS", "PARAMETERS", "STORAGE", "MEMORY")
"""Of the plan's columns."""


def plan_table(
    steps: Iterable[tuple[str, bool, Sequence[str], Estimate]],
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return heads, and a row for each step, given its name, whether it is reused, its components and its estimates."""
    rows: list[tuple[str, ...]] = []
    for name, reused, components, estimate in steps:
        sizes = (f"{estimate.parameters:,}", human_size(estimate.storage), human_size(estimate.memory))
        rows.append((name, "reuse" if reused else "run", ", ".join(components), *sizes))
    return HEADS, rows


def aligned(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table as plain text, a line for each row."""
    lines = [heads, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)
