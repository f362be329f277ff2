"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqft.planning.estimates import Estimate
from sqft.utils.text import human_size


def plan_table(steps: Iterable[tuple[str, bool, Sequence[str], Estimate]]) -> str:
    """Return a line for each step, given its name, whether it is reused, its components and its estimates."""
    rows = [("STEP", "", "COMPONENTS", "PARAMETERS", "STORAGE", "MEMORY")]
    for name, reused, components, estimate in steps:
        sizes = (f"{estimate.parameters:,}", human_size(estimate.storage), human_size(estimate.memory))
        rows.append((name, "reuse" if reused else "run", ", ".join(components), *sizes))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)
