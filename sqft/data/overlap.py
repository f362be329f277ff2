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
PER_TOKEN = 4
"""Characters in a token, about."""
LIMIT = 1 << 20
"""Characters of the text that are looked at, at most, from its start."""
OTHER_LIMIT = 1 << 25
"""Characters of the other file."""
BLOCK = 1 << 17
"""Words that are hashed at once."""
WORD = re.compile(r"[^\W_]+")


def shared_runs(text: Path, other: Path, tokens: int | None = None) -> float:
    """Return the share of a text's runs of 13 words that occur in the other file too, 0 to 1.

    Case and punctuation do not count. A text of fewer words has no runs, and a share of 0. Of the text, 1 Mi characters
    are looked at, and 32 Mi of the other file.

    Args:
        text: whose runs are counted.
        other: where they are looked for.
        tokens: of the text that count, from its start; about as many characters as they take are looked at.

    Raises:
        DataError: when a file cannot be read.
    """
    runs = list(_runs(text, min(LIMIT, PER_TOKEN * tokens if tokens else LIMIT)))
    wanted = set(runs)
    found = {run for run in _runs(other, OTHER_LIMIT) if run in wanted} if wanted else set()
    return sum(run in found for run in runs) / len(runs) if runs else 0.0


def _runs(file: Path, limit: int) -> Iterator[int]:
    """Yield the hash of each run of words in the first `limit` characters; a run may go on in the next row."""
    words: list[str] = []
    for part in _parts(file, limit):
        words += WORD.findall(part.lower())
        if len(words) > BLOCK:
            yield from _hashes(words)
            del words[: 1 - RUN]
    yield from _hashes(words)


def _hashes(words: list[str]) -> Iterator[int]:
    return map(hash, zip(*(words[start:] for start in range(RUN)), strict=False))


def _parts(file: Path, limit: int) -> Iterator[str]:
    """Yield the texts of a file, up to `limit` characters."""
    if suffix_of(file) not in SUFFIXES or suffix_of(file) == ".txt":
        content = read_text(file)[:limit]
        yield from (content[start : start + LIMIT] for start in range(0, len(content), LIMIT))
        return
    for _, row in read_rows(file, None, "train"):
        for part in () if isinstance(row, DataError) else texts_in(row):
            yield part[:limit]
            if (limit := limit - len(part)) <= 0:
                return
