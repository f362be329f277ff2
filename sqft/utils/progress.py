"""Progress of long steps: bars with time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sized
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY = 15.0  # seconds between plain lines


class Track(Protocol):
    """A progress display: pass an iterable through it."""

    def __call__(self, iterable: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]: ...


def tracker(console: Console) -> Track:
    """Return a display for this console: bars when it is a terminal, lines when it is not."""

    def bars(iterable: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        columns = (
            TextColumn("  {task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            yield from progress.track(iterable, total=_length(iterable, total), description=label)

    def lines(iterable: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
        total = _length(iterable, total)
        start = last = time.monotonic()
        for done, item in enumerate(iterable):
            now = time.monotonic()
            if done and now - last > LINE_EVERY:
                left = f", {(now - start) / done * (total - done):.0f} s left" if total else ""
                console.print(f"  {label}: {done}/{total or '?'}{left}", highlight=False, markup=False)
                last = now
            yield item

    return bars if console.is_terminal else lines


def silent(iterable: Iterable[Any], label: str, total: int | None = None) -> Iterator[Any]:
    """Show nothing."""
    yield from iterable


def _length(iterable: Iterable[Any], total: int | None) -> int | None:
    if total is None and isinstance(iterable, Sized):
        return len(iterable)
    return total
