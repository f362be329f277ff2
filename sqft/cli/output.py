"""Print tables, progress, and errors as one message."""

from __future__ import annotations

import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import click

from sqft.errors import SqftError
from sqft.utils.distributed import met_processes
from sqft.utils.termination import Terminated, terminable

F = TypeVar("F", bound=Callable[..., Any])


def report_errors(command: F) -> F:
    """Print an error that a user can fix as one message with status 2; Ctrl-C or SIGTERM as a line with 130 or 143."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            with terminable():
                return command(*args, **kwargs)
        except SqftError as error:
            if met_processes().should_report():
                click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Exception:
            if met_processes().should_report():
                raise
            sys.exit(1)
        except KeyboardInterrupt as stop:
            words = shlex.join(["sqft", *without_fresh(sys.argv[1:])])
            if met_processes().is_main:
                click.echo(f"\ninterrupted; finished work is kept. To continue: {words}", err=True)
            sys.exit(128 + (signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT))

    return wrapper  # type: ignore[return-value]


def without_fresh(words: list[str]) -> list[str]:
    """Remove --fresh from a command line: repeated, it would delete what the interrupted command made."""
    kept = []
    for before, word in zip(["", *words], words, strict=False):
        if before != "--fresh" and word != "--fresh" and not word.startswith("--fresh="):
            kept.append(word)
    return kept


def console(err: bool = False) -> Any:
    """Return where tables and progress are printed; without a terminal, lines are not wrapped."""
    from rich.console import Console

    stream = sys.stderr if err else sys.stdout  # held on to: what libraries print is kept from the screen elsewhere
    return Console(file=stream, soft_wrap=not stream.isatty())


def show_table(screen: Any, title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """Print a table without its empty columns: as Markdown under its title, or drawn on a terminal.

    Where a terminal is too narrow, the columns are drawn in several tables, each with the first one: no word is broken.
    """
    from rich.markup import escape
    from rich.table import Column, Table

    from sqft.utils.text import markdown_table

    empty = {index for index in range(1, len(heads)) if cells and all(row[index] in ("", "–") for row in cells)}
    kept = [index for index in range(len(heads)) if index not in empty]
    heads, cells = [heads[index] for index in kept], [[row[index] for index in kept] for row in cells]
    if not screen.is_terminal:
        screen.print(f"\n{markdown_table(title, heads, cells)}", highlight=False, markup=False)
        return
    needed = [_least_width(head, [row[column] for row in cells]) for column, head in enumerate(heads)]
    for columns in _fitting(screen.width, needed):
        shown = Table(*(Column(heads[column], overflow="fold") for column in columns))
        for row in cells:
            shown.add_row(*(escape(row[column]) for column in columns))
        screen.print(shown)


def _fitting(width: int, needed: Sequence[int]) -> list[list[int]]:
    """Return the columns of each table, as many as fit; the first column is in all."""
    tables: list[list[int]] = [[0]]
    for column in range(1, len(needed)):
        drawn = 1 + sum(needed[index] + 3 for index in (*tables[-1], column))  # lines, and a space on either side
        if len(tables[-1]) > 1 and drawn > width:
            tables.append([0])
        tables[-1].append(column)
    return tables


def _least_width(head: str, cells: Sequence[str]) -> int:
    """Return the width in which no word is broken; a figure stays beside its unit, a sentence need not."""
    from rich.cells import cell_len

    pieces = [head, *(piece for cell in cells for piece in ([cell] if len(cell) <= 24 else cell.split()))]
    return max(map(cell_len, pieces), default=1)
