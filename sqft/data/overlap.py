"""How much of a text occurs word for word in another one, such as the one that calibration sees, and which records
occur in another data set. No torch."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from sqft.data.conversations import texts_in
from sqft.data.readers import is_plain_text, read_rows, read_text
from sqft.data.records import ReadOptions, records_of
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
LARGEST = 1 << 25
"""Bytes of a file whose records are compared with those of others; more would take seconds."""
WORD = re.compile(r"[^\W_]+")


def shared_runs(
    texts: Sequence[tuple[Path, int | None]], other: Path, options: ReadOptions | None = None
) -> list[float]:
    """Return for each text the share of its runs of 13 words that occur in the other data too, 0 to 1.

    Case and punctuation do not count. A text of fewer words has no runs, and a share of 0. Of each text,
    1 Mi characters are looked at, and 32 Mi of the other data, once for all texts.

    Args:
        texts: whose runs are counted, each with the tokens of it that count, from its start (None for all); about as
            many characters as they take are looked at.
        other: where they are looked for.
        options: how to read its records.

    Raises:
        DataError: when a file cannot be read.
    """
    runs = [list(_runs(text, min(LIMIT, PER_TOKEN * tokens if tokens else LIMIT))) for text, tokens in texts]
    wanted = {run for of_text in runs for run in of_text}
    found = {run for run in _runs(other, OTHER_LIMIT, options) if run in wanted} if wanted else set()
    return [sum(run in found for run in of_text) / len(of_text) if of_text else 0.0 for of_text in runs]


def shared_records(asked: tuple[Path, ReadOptions], others: Iterable[tuple[Path, ReadOptions]]) -> tuple[int, int]:
    """Count the records of a data set that other data sets hold too, and all of its records. A prompt is known whatever
    its completion is; a conversation or a text as a whole.

    Files of more than 32 MiB and folders are not looked into: they count as others only where they are the same file or
    folder.

    Raises:
        DataError: when a file cannot be read.
    """
    path, options = asked
    if not _is_small(path):
        same = (other == path and (how.config, how.split) == (options.config, options.split) for other, how in others)
        return int(any(same)), 1
    wanted = [_content(record) for record in records_of(path, options)]
    known = {_content(record) for other, how in others if _is_small(other) for record in records_of(other, how)}
    return sum(content in known for content in wanted), len(wanted)


def _is_small(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= LARGEST


def _content(record: dict[str, Any]) -> int:
    asked = record["prompt"].strip() if "prompt" in record else [record.get("messages"), record.get("text")]
    return hash(json.dumps(asked, sort_keys=True))


def _runs(file: Path, limit: int, options: ReadOptions | None = None) -> Iterator[int]:
    """Yield the hash of each run of words in the first `limit` characters; a run may go on in the next row."""
    words: list[str] = []
    for part in _parts(file, limit, options):
        words += WORD.findall(part.lower())
        if len(words) > BLOCK:
            yield from _hashes(words)
            del words[: 1 - RUN]
    yield from _hashes(words)


def _hashes(words: list[str]) -> Iterator[int]:
    return map(hash, zip(*(words[start:] for start in range(RUN)), strict=False))


def _parts(file: Path, limit: int, options: ReadOptions | None) -> Iterator[str]:
    """Yield the texts of a file or data set, up to `limit` characters."""
    if is_plain_text(file):
        content = read_text(file, limit)
        yield from (content[start : start + LIMIT] for start in range(0, len(content), LIMIT))
        return
    how = (options.config, options.split, options.delimiter) if options else (None, "train")
    rows = read_rows(file, *how)
    for _, row in islice(rows, options.limit if options else None):
        # The names of fields are no part of the text.
        for part in () if isinstance(row, DataError) else texts_in([*row.values()] if isinstance(row, dict) else row):
            yield part[:limit]
            if (limit := limit - len(part)) <= 0:
                return
