"""Digests of Python source files, so that an edit to a component's code is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import util
from pathlib import Path


def package_digest(package: str) -> str:
    """Return the digest of every .py file of an importable top-level package or module; "" when it has no files."""
    try:
        spec = util.find_spec(package)
    except ValueError:  # a module that was made in memory has no spec
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        return ""
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    states = [(file, file.stat()) for file in files]
    return _digest(tuple((file, state.st_mtime_ns, state.st_size) for file, state in states), origin.parent)


@cache
def _digest(states: tuple[tuple[Path, int, int], ...], root: Path) -> str:
    """Digest files, and remember it by (file, modification time, size): an edited file is read again."""
    return digest_files([file for file, _, _ in states], root)


def digest_files(files: Iterable[Path], root: Path) -> str:
    """Return the SHA-256 over the names of files, relative to `root`, and their contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
