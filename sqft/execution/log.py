"""The log file of a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path


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
