"""Digests of Python source files and of classes, so that an edit to a component's code is noticed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
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


def class_digest(cls: type) -> str:
    """Return the digest of a class that has no file, such as one of a notebook's cell.

    It is of the bytecode of its functions, and of what these name in the class's own module: functions, classes, and
    plain values. So it is the same in each process of one version of Python.
    """
    total = hashlib.sha256()
    for part in _parts(cls, cls.__module__, set()):
        total.update(f"{part}\0".encode(errors="surrogatepass"))
    return total.hexdigest()


def _parts(value: Any, module: str, seen: set[int]) -> Iterator[str]:
    """Yield what the digest of a value is made of; a function or class of another module counts by its name."""
    value = getattr(value, "__func__", value)  # of a classmethod or a staticmethod
    value = value.fget if isinstance(value, property) else getattr(value, "func", value)
    if isinstance(value, (type, FunctionType)):
        yield value.__qualname__
        if value.__module__ != module or id(value) in seen:
            return
        seen.add(id(value))
        if isinstance(value, type):
            members = {name: member for name, member in vars(value).items() if _is_written(name, member)}
            yield from _parts([*value.__mro__[1:], *members.items()], module, seen)
        else:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
            yield from _parts([value.__defaults__, value.__kwdefaults__, *cells], module, seen)
            yield from _parts_of_code(value.__code__, value.__globals__, module, seen)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _parts(one, module, seen)
    elif isinstance(value, dict):
        yield from _parts([*value.items()], module, seen)
    elif isinstance(value, (set, frozenset)):
        yield from sorted(map(repr, value))  # their own order differs from process to process
    else:
        plain = value is None or isinstance(value, (bool, int, float, complex, str, bytes))
        yield repr(value) if plain else type(value).__qualname__


def _is_written(name: str, member: Any) -> bool:
    """Whether a member of a class is one that its author wrote, not one that Python or pydantic keeps there."""
    return isinstance(member, FunctionType) or not (name.startswith("__") and name.endswith("__"))


def _parts_of_code(code: CodeType, names: dict[str, Any], module: str, seen: set[int]) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names}"
    for constant in code.co_consts:
        inner = isinstance(constant, CodeType)
        yield from _parts_of_code(constant, names, module, seen) if inner else _parts(constant, module, seen)
    for name in code.co_names:
        if name in names:
            yield from _parts(names[name], module, seen)
