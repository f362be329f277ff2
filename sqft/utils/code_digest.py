"""Digests of Python source files, so that an edit to a component's code is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import util
from pathlib import Path


def package_digest(package: str) -> str:
    """Digest of every .py file of an importable top-level package or module; "" when it has no files."""
    try:
        spec = util.find_spec(package)
    except ValueError:  # a module made by hand has no spec
        spec = None
    if spec is None or spec.origin is None or not spec.has_location:
        return ""
    origin = Path(spec.origin)
    files = sorted(origin.parent.rglob("*.py")) if origin.name == "__init__.py" else [origin]
    states = [file.stat() for file in files]
    return _digest(tuple(zip(files, (s.st_mtime_ns for s in states), (s.st_size for s in states), strict=True)), origin)


@cache
def _digest(states: tuple[tuple[Path, int, int], ...], origin: Path) -> str:
    """Files are read once for each state they are seen in: a module edited and reloaded is another."""
    return digest_files([file for file, _, _ in states], origin.parent)


def digest_files(files: Iterable[Path], root: Path) -> str:
    """SHA-256 over names (relative to root) and contents."""
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(root).as_posix()}\0".encode())
        total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()
