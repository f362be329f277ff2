"""Whose exception is it? A component that raises is named; a bug of sqft's keeps its traceback."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from sqft.errors import PluginError, SqftError
from sqft.registry import Entry

PASSED_OVER = ("sqft.contracts", "sqft.kernels")
"""Rooms of ours that components call on their own behalf."""


class _LogFile(logging.FileHandler):
    """A log that a full disk cuts short: whoever needs the room says so."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def logged(path: Path, writing: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """Inside, what sqft logs is also in this file, and the traceback of what is raised; `writing` makes an error of
    the system's a message."""
    with writing():
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("sqft")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except (Exception, SystemExit) as error:  # the screen shows a message; the file keeps where it came from
        where = (type(error), error, error.__traceback__)
        handler.handle(logger.makeRecord("sqft", logging.ERROR, __file__, 0, "stopped", (), where))
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):  # it writes what it could not write before
            handler.close()


@contextmanager
def blaming(entries: Iterable[Entry], log: Path) -> Iterator[None]:
    """Turn an exception that arose in one of these components into a `PluginError` that names it.

    Raises:
        PluginError: with component, provider, place in its code, and `log`, the file with the traceback.
    """
    try:
        yield
    except SqftError:
        raise
    except (Exception, SystemExit) as error:  # a component that leaves has not done its work
        if (found := culprit(error, entries)) is None:
            raise
        entry, place = found
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise PluginError(f"{entry} raised {what}\n  at {place}; the traceback is in {log}") from error


def culprit(error: BaseException, entries: Iterable[Entry]) -> tuple[Entry, str] | None:
    """The component in whose code an exception arose, and "file:line"; None when it was in no component's.

    The innermost frame that is either sqft's or a component's decides: torch's error three calls below a
    scorer is the scorer's, and one in the core's `evaluate` is not that of the searcher who asked.
    """
    by_package: dict[str, list[Entry]] = {}
    for entry in entries:
        by_package.setdefault(entry.component.__module__.partition(".")[0], []).append(entry)
    frames = list(reversed(list(traceback.walk_tb(error.__traceback__))))
    for index, (frame, line) in enumerate(frames):
        module = str(frame.f_globals.get("__name__", ""))
        if candidates := by_package.get(module.partition(".")[0]):
            # A package may hold several components; the method that is running tells them apart.
            running = [type(outer.f_locals.get("self")) for outer, _ in frames[index:]]
            ranked = sorted(candidates, key=lambda e: running.index(e.component) if e.component in running else 1 << 30)
            return ranked[0], f"{frame.f_code.co_filename}:{line}"
        if module.partition(".")[0] == "sqft" and not module.startswith(PASSED_OVER):
            return None
    return None
