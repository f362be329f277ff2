"""SIGTERM, by which schedulers and supervisors stop a program, ends work as Ctrl-C does; neither is lost."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Timer, current_thread, main_thread
from typing import Any

from sqft.utils.distributed import is_one_of_several

PATIENCE = 5.0
"""Seconds in which another SIGTERM is taken for the same one: it must not cut the cleaning up short."""
AGAIN = 0.1
"""Seconds after which an interruption that Python dropped is sent again."""


class Terminated(KeyboardInterrupt):
    """Raised by SIGTERM inside `terminable`: whatever cleans up after Ctrl-C does so after this."""


@contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise `Terminated` in what is inside, and let neither it nor Ctrl-C be lost there.

    Python prints and drops what is raised in a finalizer, or in the callback of a weak reference. An interruption that
    arrives in one is sent again, so that whoever sent it need not.

    SIGTERM stays as it is where the program handles or ignores it itself. Nothing changes in other threads than the
    main one, which no signal reaches, and in one process of several, which their launcher stops and may not wait for.
    """
    handler = signal.getsignal(signal.SIGTERM)
    inside = isinstance(getattr(handler, "__self__", None), _Interruptions)
    if inside or current_thread() is not main_thread() or is_one_of_several():
        yield
        return
    interruptions, before = _Interruptions(), sys.unraisablehook
    sys.unraisablehook = partial(interruptions.dropped, before)
    if handler is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, interruptions.terminate)
    try:
        yield
    finally:
        if handler is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.unraisablehook = before


class _Interruptions:
    """What is known of those inside a `terminable`."""

    def __init__(self) -> None:
        self.raised = -PATIENCE

    def terminate(self, *_: Any) -> None:
        """Raise `Terminated`, for several signals in a row once. A handler."""
        if time.monotonic() - self.raised >= PATIENCE:
            self.raised = time.monotonic()
            raise Terminated

    def dropped(self, before: Callable[[Any], object], what: Any) -> None:
        """Send an interruption again; leave other exceptions to the hook that was there before."""
        if not issubclass(what.exc_type, KeyboardInterrupt):
            before(what)
            return
        self.raised = -PATIENCE
        again = signal.SIGTERM if issubclass(what.exc_type, Terminated) else signal.SIGINT
        timer = Timer(AGAIN, os.kill, (os.getpid(), again))
        timer.daemon = True
        timer.start()
