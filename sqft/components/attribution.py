"""Find whose exception it is: a component that raises is named, a bug of sqft's keeps its traceback."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sqft.kernels as kernels
import sqft.types as types
from sqft.components import kinds
from sqft.components.registration import Registration
from sqft.errors import PluginError, SqftError

PASSED_OVER = (types.__name__, kinds.__name__, kernels.__name__)
"""Modules and packages of ours that components call on their own behalf."""


@contextmanager
def blaming(entries: Iterable[Registration], log: Path) -> Iterator[None]:
    """Turn an exception that arose in one of these components into a `PluginError` that names it.

    Raises:
        PluginError: with component, provider, file and line in its code, and `log`, the file with the traceback.
    """
    try:
        yield
    except SqftError:
        raise
    except (Exception, SystemExit) as error:  # a component that leaves has not done its work
        if (named := culprit(error, entries)) is None:
            raise
        registration, location = named
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise PluginError(f"{registration} raised {what}\n  at {location}; the traceback is in {log}") from error


def culprit(error: BaseException, entries: Iterable[Registration]) -> tuple[Registration, str] | None:
    """Return the component in whose code an exception arose, and "file:line"; None when it was in no component's.

    The innermost frame that is either sqft's or a component's decides: torch's error three calls below a
    scorer is the scorer's, and one in the core's `evaluate` is not that of the searcher who asked.
    """
    by_package: dict[str, list[Registration]] = {}
    for registration in entries:
        by_package.setdefault(registration.component.__module__.partition(".")[0], []).append(registration)
    frames = list(reversed(list(traceback.walk_tb(error.__traceback__))))
    for index, (frame, line) in enumerate(frames):
        module = str(frame.f_globals.get("__name__", ""))
        if candidates := by_package.get(module.partition(".")[0]):
            # A package may hold several components; the method that is running tells them apart.
            running = [type(outer.f_locals.get("self")) for outer, _ in frames[index:]]
            ranked = sorted(candidates, key=lambda e: running.index(e.component) if e.component in running else 1 << 30)
            return ranked[0], f"{frame.f_code.co_filename}:{line}"
        if module.partition(".")[0] == "sqft" and not any(f"{module}.".startswith(f"{ours}.") for ours in PASSED_OVER):
            return None
    return None
