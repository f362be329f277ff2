"""Rows of files and data sets: (location, row) pairs; a row that cannot be parsed is the DataError that says why."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sqft.errors import DataError
from sqft.utils.text import brief

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".arrow")

SUPPORTED = f".jsonl, .json, .csv, .tsv and .txt, also compressed ({', '.join(COMPRESSED)}), .parquet and .arrow"
"""The formats, as messages name them."""

DELIMITERS = (";", "\t", ",", "|")
"""What people put between the cells of tables."""

UNBOUNDED = 1 << 50
"""A length longer than any split: where a slice in percent, or from the end, of such a split would end is far beyond
the end of a slice in rows, so the two can be distinguished."""

Rows = Iterator[tuple[str, Any]]
"""Pairs of a location ("file:line", as messages name it) and a row, or the DataError that says why there is none."""


def read_rows(path: Path, config: str | None, split: str, delimiter: str | None = None) -> Rows:
    """Read the rows of a file, or of a folder that is a data set.

    Args:
        path: the file or folder.
        config: which configuration of a folder's data set to read.
        split: which split, which may be sliced as `datasets` does it.
        delimiter: what is between the cells of a table as text; None: a tab in .tsv, else a comma.

    Raises:
        DataError: when the file, the data set or the slice cannot be read at all.
    """
    if not is_sliced(split):
        yield from _split(path, config, split, delimiter)
        return
    instruction, names = _parsed(split)
    rows = {}
    for name in names:
        parts = [part for part in instruction.to_absolute(dict.fromkeys(names, UNBOUNDED)) if part.splitname == name]
        last = max(end for part in parts for end in (part.from_, part.to))
        rows[name] = list(islice(_split(path, config, name, delimiter), last if last < UNBOUNDED // 1000 else None))
    try:
        absolute = instruction.to_absolute({name: len(read) for name, read in rows.items()})
    except ValueError as error:  # rounding "pct1_dropremainder" needs 100 rows
        raise DataError(f"{path}: the slice '{split}' cannot be taken: {error}") from None
    for part in absolute:
        yield from rows[part.splitname][part.from_ : part.to]


def is_sliced(split: str) -> bool:
    """Return whether a split is an expression over splits ("train[:10%]+test") rather than the name of one."""
    return any(mark in split for mark in "[]+(")


def split_names(split: str) -> set[str]:
    """Return the names of the splits that `split` takes rows of.

    Raises:
        DataError: when `datasets` cannot parse it.
    """
    return _parsed(split)[1] if is_sliced(split) else {split}


def _parsed(split: str) -> tuple[Any, set[str]]:
    from datasets import ReadInstruction

    try:
        instruction = ReadInstruction.from_spec(split)
    except (ValueError, AssertionError) as error:
        raise DataError(
            f"{error}; write slices as datasets does: train[:100], train[10%:20%], train[-50:]+test"
        ) from None
    return instruction, {part.partition("[")[0].strip() for part in split.split("+")}


def suffix_of(path: Path) -> str:
    """Return the suffix that determines a file's format, ignoring compression: ".jsonl" of "a.jsonl.gz"."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def is_plain_text(path: Path) -> bool:
    """Return whether a file is one text, where either text or records may be given: it has no suffix of records."""
    return path.is_file() and (suffix_of(path) not in SUFFIXES or suffix_of(path) == ".txt")


def read_text(path: Path, limit: int = -1) -> str:
    """Return the text of a file, decompressed: all of it, or the first `limit` characters.

    Raises:
        DataError: when it cannot be read as UTF-8 text.
    """
    try:
        with _text(path) as stream:
            return stream.read(limit)
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _bytes(path: Path) -> IO[bytes]:
    stream: IO[bytes] = COMPRESSED.get(path.suffix, open)(path, "rb")  # type: ignore[operator]
    return stream


def _text(path: Path, newline: str | None = None) -> TextIOWrapper:
    return TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline=newline)


def _split(path: Path, config: str | None, split: str, delimiter: str | None) -> Rows:
    """Read all rows of one split by its name; of a file, all rows."""
    if path.is_dir():
        saved = _saved_to_disk(path, split)
        yield from _shards(saved) if saved else _loaded_by_datasets(path, config, split)
        return
    readers: dict[str, Callable[[Path], Rows]] = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": partial(_csv, default=",", delimiter=delimiter),
        ".tsv": partial(_csv, default="\t", delimiter=delimiter),
        ".txt": _lines,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    try:
        yield from readers.get(suffix_of(path), _unknown)(path)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from None


def _unknown(path: Path) -> Rows:
    """Read a file of another suffix as JSON Lines, if its first line is JSON."""
    for number, (location, row) in enumerate(_json_lines(path)):
        if number == 0 and isinstance(row, DataError):
            raise DataError(f"{path} has no supported suffix ({SUPPORTED}), and is not JSON Lines either: {row}")
        yield location, row


def _lines(path: Path) -> Rows:
    """Read each line that is not blank as a {text}; refuse JSON Lines, which would be trained on as raw JSON text."""
    with _text(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if number == 1 and _is_object(line):
                    raise DataError(
                        f"{path} holds JSON objects, but each line of a .txt file is read as plain text; "
                        "rename it to .jsonl"
                    )
                if line.strip():
                    yield f"{path}:{number}", {"text": line.rstrip("\n")}
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> Rows:
    with _bytes(path) as stream:  # bytes: their lines end at "\n" alone, and JSON may hold U+2028 or U+0085
        for number, line in enumerate(stream, 1):
            try:
                text = line.decode("utf-8-sig")
                if text.strip():
                    yield f"{path}:{number}", json.loads(text)
            except UnicodeDecodeError as error:
                yield f"{path}:{number}", DataError(f"not UTF-8 text: {error}")
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", DataError(f"not valid JSON: {error}")


def _json(path: Path) -> Rows:
    """Read a list of objects; a file that holds JSON Lines instead is read as such, line by line."""
    with _bytes(path) as stream:
        start = b""
        while (more := stream.read(1 << 16)) and not start:
            start = more.lstrip(b"\xef\xbb\xbf \t\r\n")
    if not start.startswith(b"["):
        yield from _json_lines(path)
        return
    with _bytes(path) as stream:
        content = stream.read()
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not valid JSON: {error}") from None
    for number, row in enumerate(rows, 1):
        yield f"{path}, record {number}", row


def _csv(path: Path, default: str, delimiter: str | None) -> Rows:
    """Read a table with a header, which unless a delimiter is given the default must split."""
    with _text(path, newline="") as stream:
        reader = csv.DictReader(stream, strict=True, delimiter=delimiter or default)
        try:
            if delimiter is None and default not in (header := stream.readline()):
                mark = max(DELIMITERS, key=header.count)
                if mark in header:
                    raise DataError(
                        f"{path} has the single column {brief(header.strip())}: its cells are not split at "
                        f'{json.dumps(default)}; set "delimiter": {json.dumps(mark)} beside its path, or '
                        f"{json.dumps(default)} if that is the name of one column"
                    )
            stream.seek(0)
            for row in reader:
                location = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    columns, amount = len(reader.fieldnames or ()), "more" if None in row else "fewer"
                    yield location, DataError(f"the row has {amount} cells than the header, which has {columns}")
                else:
                    yield location, row
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None
        except csv.Error as error:
            raise DataError(
                f"{path}:{reader.line_num + 1}: not valid CSV: {error}; a cell that begins with a quote must end with "
                "one, and each quote inside is written twice"
            ) from None


def _parquet(path: Path) -> Rows:
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
        raise DataError(f"{path} is not a complete Parquet file: {str(error).splitlines()[0]}") from None


def _arrow(path: Path) -> Rows:
    import pyarrow
    from pyarrow import ipc

    number = 0
    try:
        with path.open("rb") as stream:
            try:
                batches = iter(ipc.open_stream(stream))
            except pyarrow.ArrowInvalid:
                file = ipc.open_file(stream)
                batches = (file.get_batch(index) for index in range(file.num_record_batches))
            for batch in batches:
                batch.validate(full=True)
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise DataError(f"{path} is not a complete Arrow file: {str(error).splitlines()[0]}") from None


def _saved_to_disk(path: Path, split: str) -> Path | None:
    """Return the folder of a split that `save_to_disk` wrote, which `load_dataset` cannot read; None if none did.

    Raises:
        DataError: when the data set has no such split.
    """
    if (path / "dataset_dict.json").is_file():
        if not (path / split / "state.json").is_file():
            has = ", ".join(sorted(state.parent.name for state in path.glob("*/state.json"))) or "none"
            raise DataError(f"{path} has no split '{split}'; its splits: {has}")
        return path / split
    if not (path / "state.json").is_file():
        return None
    if split != "train":
        raise DataError(f"{path} was saved as a single data set: its only split is 'train', which may be sliced")
    return path


def _shards(folder: Path) -> Rows:
    try:
        names = [Path(file["filename"]).name for file in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} does not list data files: {error}; save the data set again") from None
    for name in names:
        yield from _arrow(folder / name)


def _loaded_by_datasets(path: Path, config: str | None, split: str) -> Rows:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(str(path), config, split=split, streaming=True)
        lines = rows.info.builder_name == "text"
        for number, row in enumerate(rows, 1):
            if not lines or row["text"].strip():
                yield f"{path.name} {split}, row {number}", row
    except Exception as error:  # the builders of `datasets` raise any class
        if not any(suffix_of(file) in SUFFIXES and file.is_file() for file in path.rglob("*")):
            raise DataError(f"{path} has no data file; supported formats: {SUPPORTED}") from None
        cause = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: datasets cannot read split '{split}' of config '{config}': {cause}") from None
