"""Files of rows and Hugging Face data sets become records: a prompt and completion, a conversation, or a text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any, Protocol

from sqft.data.conversations import conversation_in, texts_in
from sqft.data.readers import is_sliced, read_rows
from sqft.data.templates import INSTRUCTION, Template, render
from sqft.errors import DataError

SHAPES = "'prompt' and 'completion', or 'messages', or 'instruction' and 'output', or 'text'"
"""The fields of a record, as messages name them."""

SURROGATE = re.compile("[\ud800-\udfff]")
"""Half of a surrogate pair, which JSON can spell and no tokenizer can encode."""

MAX_REPORTED = 5
"""The most bad records that one message names."""


class Record(dict[str, Any]):
    """A record; `location` is the file and the line or row that it was read from, as messages name it."""

    location: str


class ReadOptions(Protocol):
    """How to read a data set, as a recipe's data section states it."""

    @property
    def limit(self) -> int | None: ...
    @property
    def prompt(self) -> Template | None: ...
    @property
    def config(self) -> str | None: ...
    @property
    def split(self) -> str: ...
    @property
    def delimiter(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> Mapping[str, Any]: ...


def records_of(path: Path, options: ReadOptions, chat_template_kwargs: Mapping[str, Any] | None = None) -> list[Record]:
    """Read the records of a data set with a recipe's options. See `read_records`.

    `chat_template_kwargs` are the model's; the data set's own come before them, and a record's own before both.
    """
    records = read_records(path, options.limit, options.prompt, options.config, options.split, options.delimiter)
    for record in records:
        own = record.get("chat_template_kwargs") or {}
        if "messages" in record and (given := {**(chat_template_kwargs or {}), **options.chat_template_kwargs, **own}):
            record["chat_template_kwargs"] = given
    return records


def read_records(
    path: Path,
    limit: int | None = None,
    template: Template | None = None,
    config: str | None = None,
    split: str = "train",
    delimiter: str | None = None,
) -> list[Record]:
    """Read the records of a file or data set.

    Args:
        path: A file, or a folder that `datasets` can load. A file without a known suffix is read as JSON Lines.
        limit: Read no row after the first `limit`.
        template: Makes prompt and completion of a row's fields.
        config: Which configuration of a folder's data set to read.
        split: Which split of a folder's data set to read, possibly sliced; a file has the split "train" alone.
        delimiter: What is between the cells of a .csv or .tsv file; None: a tab in .tsv, else a comma.

    Raises:
        DataError: naming the file and the first bad rows, or saying that there is no record.
    """
    records: list[Record] = []
    mistakes: list[str] = []
    try:
        for location, row in islice(read_rows(path, config, split, delimiter), limit):
            try:
                records.append(_record(row, location, template))
            except DataError as error:
                mistakes.append(f"{location}: {error}")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if mistakes:
        more = f"\n… and {len(mistakes) - MAX_REPORTED} more" if len(mistakes) > MAX_REPORTED else ""
        raise DataError("\n".join(mistakes[:MAX_REPORTED]) + more)
    if not records:
        where = f"{path}, split '{split}'," if is_sliced(split) else str(path)
        raise DataError(f"{where} has no records; expected records with {SHAPES}")
    return records


def split_off(records: Sequence[Record], fraction: float, seed: object) -> tuple[list[Record], list[Record]]:
    """Split records into those to train on and about a `fraction` held out; at least one each, in their order.

    Whether a record is held out depends on `seed` and its index alone: a file that is read again, with another
    template or limit, holds out the same records. With a `fraction` of 0 none is held out.

    Raises:
        DataError: when there are fewer than two records.
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
    """Repeat each record `weight` times; for a fractional weight, a random subset is repeated once more.

    Raises:
        DataError: when not a single record would be left.
    """
    times, fraction = divmod(weight, 1)
    extra = sorted(rng.sample(range(len(records)), round(fraction * len(records))))
    if not (times or extra):
        raise DataError(f"a weight of {weight:g} selects none of {len(records)} records; raise it, or remove this data")
    return [*list(records) * int(times), *(records[index] for index in extra)]


@contextmanager
def locate_errors(record: dict[str, Any], number: int) -> Iterator[None]:
    """Prefix a DataError raised inside with the record's location, or else its number."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{getattr(record, 'location', f'record {number}')}: {error}") from None


def _record(row: Any, location: str, template: Template | None) -> Record:
    if isinstance(row, DataError):
        raise row
    if isinstance(row, dict) and template is None:
        # What is no conversation may still have the column, empty.
        row = conversation_in(row) or {name: value for name, value in row.items() if name != "messages"}
        if "instruction" in row and not row.keys() & {"prompt", "messages"}:
            template = INSTRUCTION
    if isinstance(row, dict) and template is not None:
        row = render(template, row)
    if mistake := _mistake(row):
        raise DataError(mistake)
    record = Record(row)
    record.location = location
    return record


def _mistake(record: Any) -> str | None:
    """Return what is wrong with a record; None when nothing is."""
    if not isinstance(record, dict):
        return f"expected a JSON object with {SHAPES}, found {type(record).__name__}"
    if "messages" in record:
        broken = any(SURROGATE.search(text) for text in texts_in([record["messages"], record.get("tools")]))
        return "'messages' holds half of a surrogate pair, which no tokenizer can encode" if broken else None
    keys = ("prompt", "completion") if "prompt" in record or "completion" in record else ("text",)
    for key in keys:
        if not _is_text(record.get(key)):
            has = ", ".join(f"'{name}'" for name in record) or "no fields"
            what = "not text" if key in record else f"missing; the record has {has}; a prompt template can map them"
            return f"expected {SHAPES}; '{key}' is {what}"
    return None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not SURROGATE.search(value)
