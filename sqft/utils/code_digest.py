"""Digests of Python source files and of notebooks' cells, so that an edit to a component's code is noticed."""

from __future__ import annotations

import hashlib
import inspect
import linecache
from collections.abc import Iterable
from functools import cache
from importlib import util
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any


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


def cells_digest(cls: type) -> str:
    """Return the digest of the notebook cells that define a class and what it calls there; "" when their source is not
    to be had, or does not tell all: a function made inside another one depends on how that was called.

    Plain values that it reads from other cells count too; other objects there do not.
    """
    texts, seen, waiting = set[str](), set[int](), list[Any]([cls])
    while waiting:
        one = inspect.unwrap(waiting.pop())
        if id(one) in seen or getattr(one, "__module__", None) != cls.__module__:
            continue
        seen.add(id(one))
        if isinstance(one, type):
            waiting += [*one.__bases__, *(function for member in vars(one).values() for function in _functions(member))]
        elif isinstance(one, FunctionType):
            lines = linecache.getlines(one.__code__.co_filename)
            if not lines or set(one.__code__.co_freevars) - {"__class__"}:  # which super() needs
                return ""
            texts |= {"".join(lines), f"{one.__qualname__} in line {one.__code__.co_firstlineno}"}
            for name in _names(one.__code__) & one.__globals__.keys():
                value = one.__globals__[name]
                if isinstance(value, (bool, int, float, complex, str, bytes)):
                    texts.add(f"{name} = {value!r}")
                waiting.append(value)
    return hashlib.sha256("\0".join(sorted(texts)).encode(errors="surrogatepass")).hexdigest() if texts else ""


def _functions(member: Any) -> list[Any]:
    """Return the functions of a member of a class."""
    if isinstance(member, property):
        return [member.fget, member.fset, member.fdel]
    return [getattr(member, "__func__", getattr(member, "func", member))]


def _names(code: CodeType) -> set[str]:
    """Return the names that a function reads, and those inside it."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*inner)
