"""Records in: files of rows or a Hugging Face data set, each row a prompt and completion, a conversation or a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Protocol

from sqft.data.readers import is_sliced, rows_of
from sqft.data.templates import INSTRUCTION, Template, render
from sqft.errors import DataError

SHAPES = "'prompt' and 'completion', or 'messages', or 'instruction' and 'output', or 'text'"
SURROGATE = re.compile("[\ud800-\udfff]")
WRONG = 5
"""How many bad records a message names."""


class Record(dict[str, Any]):
    """A record of a file; `place` is the file and the line or row it came from."""

    place: str


class HowToRead(Protocol):
    """What a recipe says of a data set; all but `path`, which has been found by then."""

    @property
    def limit(self) -> int | None: ...
    @property
    def prompt(self) -> Template | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...


def records_of(path: Path, how: HowToRead) -> list[Record]:
    """The records of a data set as a recipe wants them read. See `read_records`."""
    return read_records(path, how.limit, how.prompt, how.config, how.split)


def read_records(
    path: Path,
    limit: int | None = None,
    template: Template | None = None,
    config: str | None = None,
    split: str = "train",
) -> list[Record]:
    """The records of a file, each a `Record`; nothing after the first `limit` is read.

    `template` makes prompt and completion of a row's fields. A folder is a data set as `datasets` reads it, of which
    `config` and `split` are taken; a file has the split "train" alone. A file of no known suffix is JSON Lines.

    Raises:
        DataError: naming the file and the first bad rows, or saying that there is no record.
    """
    records: list[Record] = []
    wrong: list[str] = []
    try:
        for place, row in islice(rows_of(path, config, split), limit):
            try:
                records.append(_record(row, place, template))
            except DataError as error:
                wrong.append(f"{place}: {error}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if wrong:
        more = f"\n… and {len(wrong) - WRONG} more" if len(wrong) > WRONG else ""
        raise DataError("\n".join(wrong[:WRONG]) + more)
    if not records:
        where = f"{path}, split '{split}'," if is_sliced(split) else str(path)
        raise DataError(f"{where} holds no record; expected {SHAPES} in each")
    return records


def split_off(records: Sequence[Record], fraction: float, seed: object) -> tuple[list[Record], list[Record]]:
    """The records without about a `fraction` of them, and those, both in their order; at least one each.

    Whether a record is held out is drawn from `seed` and its number alone: a file that is read twice, with another
    template or limit, holds out the same ones.

    Raises:
        DataError: when there are fewer than two.
    """
    if not fraction:
        return list(records), []
    if len(records) < 2:
        raise DataError("one record cannot be split into training and validation; give more, or set holdout to 0")
    drawn = [Random(f"{seed}/{index}").random() for index in range(len(records))]
    held = {index for index, number in enumerate(drawn) if number < fraction} or {drawn.index(min(drawn))}
    if len(held) == len(records):
        held.remove(drawn.index(max(drawn)))
    return (
        [record for index, record in enumerate(records) if index not in held],
        [record for index, record in enumerate(records) if index in held],
    )


def repeated(records: Sequence[Record], weight: float, rng: Random) -> list[Record]:
    """Each record `weight` times; of a broken number, a drawn part of them comes once more.

    Raises:
        DataError: when that is none at all.
    """
    whole, part = divmod(weight, 1)
    extra = sorted(rng.sample(range(len(records)), round(part * len(records))))
    if not (whole or extra):
        raise DataError(f"a weight of {weight:g} draws none of its {len(records)} records; raise it, or leave them out")
    return [*list(records) * int(whole), *(records[index] for index in extra)]


@contextmanager
def named(record: dict[str, Any], number: int) -> Iterator[None]:
    """A DataError raised inside says whose it is: the record's file and line, else its number."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{getattr(record, 'place', f'record {number}')}: {error}") from None


def _record(row: Any, place: str, template: Template | None) -> Record:
    if isinstance(row, DataError):
        raise row
    if isinstance(row, dict) and template is None and "instruction" in row and not row.keys() & {"prompt", "messages"}:
        template = INSTRUCTION
    if isinstance(row, dict) and template is not None:
        row = render(template, row)
    if mistake := _mistake(row):
        raise DataError(mistake)
    record = Record(row)
    record.place = place
    return record


def _mistake(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"expected a JSON object with {SHAPES}, found {type(record).__name__}"
    if "messages" in record:
        messages = record["messages"]
        whole = isinstance(messages, list) and all(
            isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content")) for m in messages
        )
        if not whole or not any(m["role"] == "assistant" for m in messages):
            return "'messages' must be a list of {role, content} with at least one assistant turn"
        return None
    keys = ("prompt", "completion") if "prompt" in record or "completion" in record else ("text",)
    for key in keys:
        if not _is_text(record.get(key)):
            has = ", ".join(f"'{name}'" for name in record) or "nothing"
            what = "not text" if key in record else f"missing; it has {has}: a prompt template may fit them"
            return f"expected {SHAPES}; '{key}' is {what}"
    return None


def _is_text(value: Any) -> bool:
    """A string that can be tokenized: JSON can also spell half of a surrogate pair."""
    return isinstance(value, str) and not SURROGATE.search(value)
