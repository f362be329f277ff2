"""Locks between processes that share a store, each a file in one folder.

They are the operating system's (`flock`): those of a process that ended, however it ended, are free.
"""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

log = logging.getLogger("sqft")


class Locks:
    """Named locks; a lock is held exclusively by one process, or shared by several."""

    def __init__(self, folder: Path, writing: Callable[[], AbstractContextManager[None]]) -> None:
        """Keep lock files in `folder`; `writing` is entered around file access, to turn an OSError into a message."""
        self.folder, self._writing = folder, writing

    @contextmanager
    def hold(self, name: str, wait: bool = True, shared: bool = False) -> Iterator[bool]:
        """Hold a lock in the block, which gets True; or False when it is not free and we do not `wait` for it."""
        lock, free = self.folder / name, True
        how = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
        with self._writing():
            lock.parent.mkdir(parents=True, exist_ok=True)
            stream = lock.open("w")
        with stream:
            with self._writing():
                try:
                    fcntl.flock(stream, how | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
                    if wait:
                        log.info("another run works on %s; waiting for it", lock.stem)
                        fcntl.flock(stream, how)
            yield free or wait

    def is_exclusive(self, name: str) -> bool:
        """Return whether a process holds that lock exclusively at this moment."""
        return self._is_refused(name, fcntl.LOCK_SH)

    def is_held(self, name: str) -> bool:
        """Return whether a process holds that lock at this moment, exclusively or shared."""
        return self._is_refused(name, fcntl.LOCK_EX)

    def _is_refused(self, name: str, how: int) -> bool:
        try:
            with (self.folder / name).open() as stream:
                fcntl.flock(stream, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # there is no such lock file, so no process has begun that artifact
            return False
        return False
