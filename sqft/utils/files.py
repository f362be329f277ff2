"""Files written whole or not at all, and errors of the file system in one line."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqft.errors import SqftError

CHECKPOINTS = "checkpoints"
"""A folder that a stage resumes from: no part of the artifact, and gone once that stands."""


def unreadable(error: OSError, path: Path) -> SqftError:
    return SqftError(f"{error.filename or path} cannot be read: {error.strerror or error}")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    text = json.dumps(content, indent=2) + "\n"
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # two runs of one recipe write the same files
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def sync(path: Path) -> None:
    """Bring a file's content, or a folder's list of names, to the disk: a power cut leaves it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some network file systems cannot do it for folders
            raise
    finally:
        os.close(descriptor)


def reason(error: Exception) -> str:
    """An error in a line: the system's words and the file, or its own."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return str(error).partition("\n")[0] or type(error).__name__
