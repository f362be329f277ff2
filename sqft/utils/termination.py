"""SIGTERM, by which schedulers and supervisors stop a program, ends work as Ctrl-C does."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

from sqft.utils.distributed import is_one_of_several

PATIENCE = 5.0
"""Seconds in which another SIGTERM is taken for the same one: it must not cut the cleaning up short."""


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM inside `terminable`: whatever cleans up after Ctrl-C does so after this."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in what is inside.

    It stays as it is where the program handles or ignores it itself, in other threads than the main one, which no
    signal reaches, and in one process of several, which their launcher stops and may not wait for.
    """
    ours = current_thread() is main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if not ours or is_one_of_several():
        yield
        return
    signal.signal(signal.SIGTERM, _terminator())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminator() -> Callable[..., None]:
    """Return a handler that raises, and again if what it raised was swallowed: in a `__del__`, for instance."""
    raised = -PATIENCE

    def terminate(*_: Any) -> None:
        nonlocal raised
        if time.monotonic() - raised >= PATIENCE:
            raised = time.monotonic()
            raise Terminated

    return terminate
