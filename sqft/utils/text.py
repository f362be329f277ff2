"""Values as people read them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence


def brief(value: object) -> str:
    """A value as JSON, cut to a line."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def human(size: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def markdown(title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Any table as Markdown, under its title."""
    return "\n".join([f"# {title}", "", _line(heads), "|" + "---|" * len(heads), *map(_line, cells)]) + "\n"


def _line(cells: Sequence[str]) -> str:
    """A row of a Markdown table; what names hold of Markdown stands for itself."""
    return "| " + " | ".join(re.sub(r"([\\|`*<\[])", r"\\\1", " ".join(cell.split())) for cell in cells) + " |"
