"""Glob patterns over the names of layers."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable


def selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether a layer matches a glob of `include` and none of `exclude`.

    A glob matches the full name ("*.layers.0.*") or its last part alone ("q_proj"); case matters.
    """
    return any(_matches(name, glob) for glob in include) and not any(_matches(name, glob) for glob in exclude)


def names_itself(name: str, globs: Iterable[str]) -> bool:
    """Return whether one of the globs means a layer by its own name: "*.in_proj_*" does, "*" and "*.mlp.*" do not."""
    return any(_matches(name, glob) and glob.rpartition(".")[2].strip("*?") for glob in globs)


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition(".")[2], glob)
