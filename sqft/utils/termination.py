"""SIGTERM, by which schedulers and supervisors stop a program, ends work as Ctrl-C does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

from sqft.utils.distributed import is_one_of_several


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
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the cleaning up short
    raise Terminated
