"""Glob patterns over the names of layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether a layer matches a glob of `include` and none of `exclude`.

    A glob matches the full name ("*.layers.0.*") or its last part alone ("q_proj"); case matters.
    """
    last = name.rpartition(".")[2]

    def matches(globs: Iterable[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(last, glob) for glob in globs)

    return matches(include) and not matches(exclude)
