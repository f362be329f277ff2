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
from sqft.utils.distributed import processes
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
            if processes().should_report():
                click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Exception:
            if processes().should_report():
                raise
            sys.exit(1)
        except KeyboardInterrupt as stop:
            words = shlex.join(["sqft", *without_fresh(sys.argv[1:])])
            if processes().is_main:
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
    """Print a table: drawn on a terminal, cells wrapped where it is narrow; elsewhere as Markdown under its title."""
    from rich.markup import escape
    from rich.table import Column, Table

    from sqft.utils.text import markdown_table

    if not screen.is_terminal:
        screen.print(f"\n{markdown_table(title, heads, cells)}", highlight=False, markup=False)
        return
    shown = Table(*(Column(head, overflow="fold") for head in heads))
    for row in cells:
        shown.add_row(*map(escape, row))
    screen.print(shown)
