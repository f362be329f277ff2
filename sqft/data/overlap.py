"""How much of a text occurs word for word in another one, such as the one that calibration sees. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from sqft.data.conversations import texts_in
from sqft.data.readers import SUFFIXES, read_rows, read_text, suffix_of
from sqft.errors import DataError

RUN = 13
"""Words in a row that texts of different origin hardly ever share (Brown et al. 2020, Language Models are Few-Shot
Learners, appendix C)."""
LIMIT = 1 << 20
"""Characters of a file that are looked at, from its start."""
WORD = re.compile(r"[^\W_]+")


def shared_runs(text: Path, other: Path) -> float:
    """Return the share of a text's runs of 13 words that occur in the other file too, 0 to 1.

    Case and punctuation do not count. A text of fewer words has no runs, and a share of 0.

    Raises:
        DataError: when a file cannot be read.
    """
    known, runs = set(_runs(other)), list(_runs(text))
    return sum(run in known for run in runs) / len(runs) if runs else 0.0


def _runs(file: Path) -> Iterator[int]:
    words = WORD.findall(_text(file).lower())
    return (hash(tuple(words[start : start + RUN])) for start in range(len(words) - RUN + 1))


def _text(file: Path) -> str:
    if suffix_of(file) not in SUFFIXES or suffix_of(file) == ".txt":
        return read_text(file)[:LIMIT]
    parts: list[str] = []
    size = 0
    for _, row in read_rows(file, None, "train"):
        found = [] if isinstance(row, DataError) else list(texts_in(row))
        parts += found
        if (size := size + sum(map(len, found))) > LIMIT:
            break
    return "\n".join(parts)[:LIMIT]
