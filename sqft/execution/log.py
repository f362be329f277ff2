"""Where a run's log goes: a file in the run's folder, and the screen of a command."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path


class _LogFile(logging.FileHandler):
    """A log file that a full disk cuts short without an error: the step that needs the room reports it."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


@contextmanager
def log_to_file(
    path: Path, writing: Callable[[], AbstractContextManager[None]], level: int = logging.INFO
) -> Iterator[None]:
    """Copy what sqft logs inside the block to a file, and the traceback of the exception that ends it.

    `writing` is entered while the file is opened, to turn an OSError into a message.
    """
    with writing():
        handler = _LogFile(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.setLevel(level)
    logger = logging.getLogger("sqft")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    except (Exception, SystemExit) as error:  # the screen shows only a message; the file keeps the traceback
        traceback = (type(error), error, error.__traceback__)
        handler.handle(logger.makeRecord("sqft", logging.ERROR, __file__, 0, "stopped", (), traceback))
        raise
    finally:
        logger.removeHandler(handler)
        with suppress(OSError):  # closing writes what could not be written before
            handler.close()


def log_to_screen(show: Callable[[str], None]) -> None:
    """Show what sqft logs as plain lines, and nowhere else."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            show(f"{prefix}{record.getMessage()}")

    logger = logging.getLogger("sqft")
    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
