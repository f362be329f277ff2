"""SHA-256 digests of files and folders, remembered between runs."""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path

from sqft.utils.files import unreadable

SETTLED = 2 * 10**9
"""Nanoseconds after which a change of a file shows in its times: the tick of the coarsest file system clock, FAT's."""


class Digests:
    """SHA-256 of files, remembered in the file `memory` if that can be written.

    A file is recognised by path, size, times and inode. One that changed less than `SETTLED` ago is read again: a
    second change within one tick of the file system's clock would not show.
    """

    def __init__(self, memory: Path | None = None) -> None:
        self._memory = memory

    @cached_property
    def _known(self) -> dict[str, str]:
        if self._memory is None:
            return {}
        try:
            known = json.loads(self._memory.read_text("utf-8"))
        except (OSError, ValueError):  # not written yet, or damaged: everything is read again
            return {}
        known = known if isinstance(known, dict) else {}
        return {key: digest for key, digest in known.items() if isinstance(digest, str)}

    def file(self, path: Path) -> str:
        """Return the hexadecimal digest of one file's content."""
        path = path.resolve()
        state = path.stat()
        key = f"{path}|{state.st_size}|{state.st_mtime_ns}|{state.st_ctime_ns}|{state.st_ino}"
        settled = time.time_ns() - state.st_ctime_ns >= SETTLED
        if settled and key in self._known:
            return self._known[key]
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        if settled:
            self._known[key] = digest
            self._remember()
        return digest

    def path(self, path: Path) -> str:
        """Return the digest of a file, or of the names and contents of all files below a folder.

        Hidden files, and the store if it lies in the folder, are left out.

        Raises:
            SqftError: when something cannot be read.
        """
        try:
            if not path.is_dir():
                return self.file(path)
            total, folder = hashlib.sha256(), path.resolve()
            store = self._memory.parent.resolve() if self._memory else None
            own = store if store and folder in store.parents else None  # what sqft itself writes
            for file in sorted(path.rglob("*")):
                name = file.relative_to(path)
                # Editors and running code write hidden files.
                hidden = any(part.startswith(".") or part == "__pycache__" for part in name.parts)
                if file.is_file() and not hidden and own not in (folder / name).parents:
                    total.update(f"{name.as_posix()}\0{self.file(file)}\0".encode())
            return total.hexdigest()
        except OSError as error:
            raise unreadable(error, path) from None

    def _remember(self) -> None:
        if self._memory is None:
            return
        temporary = self._memory.with_name(f".{self._memory.name}-{os.getpid()}")
        try:
            temporary.write_text(json.dumps(self._known))
            os.replace(temporary, self._memory)
        except OSError:  # a read-only store can still be used
            with suppress(OSError):
                temporary.unlink()
