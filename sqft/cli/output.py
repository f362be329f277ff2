"""Where commands print: tables, progress, and errors as one message."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, TypeVar

import click

from sqft.errors import SqftError
from sqft.utils.distributed import processes

F = TypeVar("F", bound=Callable[..., Any])


def explained(command: F) -> F:
    """Turn what the user can mend into one message and status 2, and Ctrl-C into a line and 130."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except SqftError as error:
            if processes().should_report():
                click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Exception:
            if processes().should_report():
                raise
            sys.exit(1)
        except KeyboardInterrupt:
            words = shlex.join(["sqft", *_without_fresh(sys.argv[1:])])
            if processes().is_main:
                click.echo(f"\ninterrupted; finished work is kept. To go on: {words}", err=True)
            sys.exit(130)

    return wrapper  # type: ignore[return-value]


def _without_fresh(words: list[str]) -> list[str]:
    """A command line without --fresh, which would throw away what it made when it is repeated."""
    kept = []
    for before, word in zip(["", *words], words, strict=False):
        if before != "--fresh" and word != "--fresh" and not word.startswith("--fresh="):
            kept.append(word)
    return kept


def console(err: bool = False) -> Any:
    """Where tables and progress go; lines stay whole where there is no terminal."""
    from rich.console import Console

    return Console(stderr=err, soft_wrap=not (sys.stderr if err else sys.stdout).isatty())


def show_table(on: Any, title: str, heads: Sequence[str], cells: Sequence[Sequence[str]]) -> None:
    """A table: drawn on a terminal, folded where that is narrow, and Markdown under its title anywhere else."""
    from rich.markup import escape
    from rich.table import Column, Table

    from sqft.utils.text import markdown

    if not on.is_terminal:
        on.print(f"\n{markdown(title, heads, cells)}", highlight=False, markup=False)
        return
    shown = Table(*(Column(head, overflow="fold") for head in heads))
    for row in cells:
        shown.add_row(*map(escape, row))
    on.print(shown)
