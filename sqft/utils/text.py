"""Values as people read them."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from html import escape


def brief(value: object) -> str:
    """Return a value as JSON, shortened to 60 characters."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


def shortened(names: Sequence[str], shown: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def human_size(size: float) -> str:
    """Return a number of bytes with a unit: "12 B", "3 KiB", "1.25 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


def signed_percent(share: float) -> str:
    """Return a share in hundredths, with its sign: "+1.5"."""
    return f"{100 * share:+.1f}".replace("-", "−")


def markdown_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, under its title."""
    return f"# {title}\n\n{markdown_rows(head, rows)}\n"


def markdown_rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown; Markdown's own characters in cells are escaped."""
    return "\n".join([_line(head), "|" + "---|" * len(head), *map(_line, rows)])


def html_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in HTML, under its title."""
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f"<table><caption>{escape(title)}</caption><tr>{heads}</tr>{body}</table>"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"


def escaped(text: str) -> str:
    """Return a text on one line, Markdown's own characters escaped."""
    return re.sub(r"([\\|`*<\[])", r"\\\1", " ".join(text.split()))
