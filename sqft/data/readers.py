"""Rows of files and data sets: (place, row) pairs, where a row that cannot be had is the DataError that says why."""

from __future__ import annotations

import bz2
import csv
import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path
from typing import IO, Any

from sqft.errors import DataError

COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


SUFFIXES = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".arrow")


SUPPORTED = f".jsonl, .json, .csv and .txt, also compressed ({', '.join(COMPRESSED)}), .parquet and .arrow"


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


def suffix_of(path: Path) -> str:
    """What names a file's format: of a compressed one, of what is in it."""
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def text_of(path: Path) -> str:
    """A file's whole text, decompressed.

    Raises:
        DataError: when it cannot be read as UTF-8 text.
    """
    try:
        with _text(path) as stream:
            return stream.read()
    except (OSError, UnicodeDecodeError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _bytes(path: Path) -> IO[bytes]:
    stream: IO[bytes] = COMPRESSED.get(path.suffix, open)(path, "rb")  # type: ignore[operator]
    return stream


def _text(path: Path, newline: str | None = None) -> TextIOWrapper:
    return TextIOWrapper(_bytes(path), encoding="utf-8-sig", newline=newline)


def _whole(path: Path, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    if path.is_dir():
        saved = _saved(path, split)
        yield from _shards(saved) if saved else _data_set(path, config, split)
        return
    readers = {
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".txt": _lines,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }
    try:
        yield from readers.get(suffix_of(path), _unknown)(path)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from None


def _unknown(path: Path) -> Iterator[tuple[str, Any]]:
    """A file that may be JSON Lines: its first line must be."""
    for number, (place, row) in enumerate(_json_lines(path)):
        if number == 0 and isinstance(row, DataError):
            raise DataError(f"{path} is of no format that is known by name ({SUPPORTED}), nor JSON Lines: {row}")
        yield place, row


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line a text, but for blank ones. JSON Lines by this name are refused: nobody means to learn their braces."""
    with _text(path) as stream:
        try:
            for number, line in enumerate(stream, 1):
                if number == 1 and _is_object(line):
                    raise DataError(f"{path} holds JSON objects, and each line of a .txt is a text; name it .jsonl")
                if line.strip():
                    yield f"{path}:{number}", {"text": line.rstrip("\n")}
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 text: {error}") from None


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
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


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    """A list of objects in one file; a file that is JSON Lines by another name is read as such."""
    with _bytes(path) as stream:
        content = stream.read()
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
    with _text(path, newline="") as stream:
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


def _arrow(path: Path) -> Iterator[tuple[str, Any]]:
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
        raise DataError(f"{path} is no whole Arrow file: {str(error).splitlines()[0]}") from None


def _saved(path: Path, split: str) -> Path | None:
    """Where a split lies that `save_to_disk` wrote, which `load_dataset` refuses to read; None of other folders."""
    if (path / "dataset_dict.json").is_file():
        if not (path / split / "state.json").is_file():
            has = ", ".join(sorted(state.parent.name for state in path.glob("*/state.json"))) or "none"
            raise DataError(f"{path} has no split '{split}'; it has {has}")
        return path / split
    if not (path / "state.json").is_file():
        return None
    if split != "train":
        raise DataError(f"{path} was saved as one data set, and has no split but 'train', whole or sliced")
    return path


def _shards(folder: Path) -> Iterator[tuple[str, Any]]:
    try:
        names = [Path(file["filename"]).name for file in json.loads((folder / "state.json").read_text())["_data_files"]]
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder / 'state.json'} names no files: {error}; save the data set again") from None
    for name in names:
        yield from _arrow(folder / name)


def _data_set(path: Path, config: str | None, split: str) -> Iterator[tuple[str, Any]]:
    import datasets

    datasets.disable_progress_bars()
    try:
        rows = datasets.load_dataset(str(path), config, split=split, streaming=True)
        lines = rows.info.builder_name == "text"
        for number, row in enumerate(rows, 1):
            if not lines or row["text"].strip():
                yield f"{path.name} {split}, row {number}", row
    except Exception as error:  # its builders raise anything
        if not any(suffix_of(file) in SUFFIXES and file.is_file() for file in path.rglob("*")):
            raise DataError(f"{path} holds no file that is read as data: {SUPPORTED}") from None
        said = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: datasets cannot read split '{split}' of config '{config}': {said}") from None
