"""Glob patterns over the names of layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence


def selected(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Return whether a layer matches a glob of `include` and none of `exclude`.

    A glob matches the full name ("*.layers.0.*") or its last part alone ("q_proj"); case matters.
    """
    return any(_matches(name, glob) for glob in include) and not any(_matches(name, glob) for glob in exclude)


def names_itself(name: str, globs: Iterable[str]) -> bool:
    """Return whether one of the globs means a layer by its own name: "*.in_proj_*" does, "*" and "*.mlp.*" do not."""
    return any(_matches(name, glob) and glob.rpartition(".")[2].strip("*?") for glob in globs)


def covering(names: Iterable[str], others: Sequence[str], known: Iterable[str] = ()) -> list[str]:
    """Return globs that match these layers and none of the others: the `known` ones, and more where they are needed."""
    globs = dict.fromkeys(known)
    for name in sorted(names):
        if not any(_matches(name, glob) for glob in globs):
            parts = re.sub(r"(?<=\.)\d+(?=\.)", "*", name).split(".")  # in every block, of every expert
            tails = (f"*.{'.'.join(parts[start:])}" for start in range(len(parts) - 1, 0, -1))
            globs[next((tail for tail in tails if not any(_matches(other, tail) for other in others)), name)] = None
    return list(globs)


def _matches(name: str, glob: str) -> bool:
    return fnmatch.fnmatchcase(name, glob) or fnmatch.fnmatchcase(name.rpartition(".")[2], glob)
