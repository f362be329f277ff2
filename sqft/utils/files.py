"""Files and folders written completely or not at all, and errors of the file system in one line."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqft.errors import SqftError

MANIFEST = "manifest.json"
"""The file of an artifact that seals it."""
CHECKPOINTS = "checkpoints"
"""A folder that a stage resumes from: it is no part of the artifact, and is deleted once that is complete."""


def unreadable(error: OSError, path: Path) -> SqftError:
    """Return the error that says which file cannot be read, and why."""
    return SqftError(f"{error.filename or path} cannot be read: {error.strerror or error}")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file completely or not at all."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file completely or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, "utf-8")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield another file to write to: it takes the place of `path` when the block has ended and it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two runs of one recipe write the same files
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def copy_folder(source: Path, destination: Path) -> None:
    """Copy a folder completely or not at all; `destination` must be an empty folder, or not exist.

    Raises:
        OSError: when it cannot be written; nothing is left behind then.
    """
    partial = destination.with_name(f".{destination.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, partial)
        if destination.is_dir():
            destination.resolve().rmdir()
        os.replace(partial, destination.resolve())
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder, not of what links lead to; 0 where there is none.

    Raises:
        OSError: when a file vanishes meanwhile.
    """
    return sum(file.lstat().st_size for file in folder.rglob("*") if file.is_file())


def existing_parent(path: Path) -> Path:
    """Return the nearest folder above `path`, or `path` itself, that is seen to exist."""
    path = path.resolve()  # `Path.exists` raises where a folder on the way may not be searched
    return next(folder for folder in (path, *path.parents) if os.path.exists(folder))


def unwritable(path: Path) -> str | None:
    """Return why a folder, there yet or not, cannot be made or written to; None where permissions allow it."""
    folder = existing_parent(path)
    if not folder.is_dir():
        return f"{folder} is a file"
    return None if os.access(folder, os.W_OK | os.X_OK) else f"{folder} may not be written to"


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk, so that it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """Return an error as one line: the system's words and the file, or its own message."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).partition("\n")[0] or type(error).__name__
