"""Rows of files and data sets: (place, row) pairs, where a row that cannot be had is the DataError that says why."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from sqft.errors import DataError

MANY = 1 << 50
"""More rows than any split has: a slice in percent, or from the end, of so many lies far beyond one in numbers."""


def rows_of(path: Path, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    """The rows of a file, or of a folder that is a data set; of `split`, which may be sliced as `datasets` does.

    Raises:
        DataError: when the file, the data set or the slice cannot be read at all.
    """
    if not is_sliced(split):
        yield from _whole(path, config, split)
        return
    instruction, names = _parsed(split)
    rows = {}
    for name in names:
        parts = [part for part in instruction.to_absolute(dict.fromkeys(names, MANY)) if part.splitname == name]
        last = max(end for part in parts for end in (part.from_, part.to))
        rows[name] = list(islice(_whole(path, config, name), last if last < MANY // 1000 else None))
    try:
        absolute = instruction.to_absolute({name: len(found) for name, found in rows.items()})
    except ValueError as error:  # a rounding that needs 100 rows
        raise DataError(f"{path}: '{split}' cannot be taken: {error}") from None
    for part in absolute:
        yield from rows[part.splitname][part.from_ : part.to]


def is_sliced(split: str) -> bool:
    """Whether a split is an expression over splits ("train[:10%]+test") and not the name of one."""
    return any(mark in split for mark in "[]+(")


def split_names(split: str) -> set[str]:
    """The splits that `split` takes rows of.

    Raises:
        DataError: when it is nothing that `datasets` knows.
    """
    return _parsed(split)[1] if is_sliced(split) else {split}


def _parsed(split: str) -> tuple[Any, set[str]]:
    from datasets import ReadInstruction

    try:
        instruction = ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        raise DataError(f"{error}; write as datasets does: train[:100], train[10%:20%], train[-50:]+test") from None
    return instruction, {part.partition("[")[0].strip() for part in split.split("+")}


def _whole(path: Path, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        return _data_set(path, config, split)
    readers = {".json": _json, ".csv": _csv, ".parquet": _parquet}
    return readers.get(path.suffix, _json_lines)(path)


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as stream:  # bytes: their lines end at "\n" alone, and JSON may hold U+2028 or U+0085
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield f"{path}:{number}", json.loads(text)
            except UnicodeDecodeError as error:
                yield f"{path}:{number}", DataError(f"not UTF-8 text: {error}")
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", DataError(f"not valid JSON: {error}")


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects in one file; a file that is JSON Lines by another name is read as such."""
    content = path.read_bytes()
    if not content.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        yield from _json_lines(path)
        return
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, record {number}", row


def _csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    heads = len(reader.fieldnames or ())
                    yield (
                        place,
                        DataError(f"the row has {'more' if None in row else 'fewer'} cells than its {heads} heads"),
                    )
                else:
                    yield place, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is no whole Parquet file: {str(error).splitlines()[0]}") from None


def _data_set(path: Path, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(str(path), config, split=split, streaming=True)
        for number, row in enumerate(rows, 1):
            yield f"{path.name} {split}, row {number}", row
    except Exception as error:  # its builders raise anything
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: datasets cannot read split '{split}' of config '{config}': {said}") from None
