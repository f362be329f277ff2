"""Glob patterns over the names of layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Whether a layer's full name, or its last part, matches a glob of `include` and none of `exclude`."""
    last = name.rpartition(".")[2]

    def hit(patterns: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(last, p) for p in patterns)

    return hit(include) and not hit(exclude)
