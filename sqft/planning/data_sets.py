"""Find the files and data sets that a recipe names, and check that they can be read as it says."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from sqft.data.hub import fetch_data_set, is_data_set_id
from sqft.data.readers import SUPPORTED, read_text, split_names, suffix_of
from sqft.errors import DataError, Problem, SqftError
from sqft.recipe.data import Data

START = 1 << 16
"""Characters of a plain text that the plan reads, to see that it is text."""
OF_RECORDS = ("limit", "split", "prompt", "chat_template_kwargs")
"""Fields of a data set that say how records are read."""


def find_data_set(data: Data, place: str, resolve: Callable[[str], Path]) -> tuple[Path, list[Problem]]:
    """Return the path of a file of records or a folder that is a data set, and what is wrong.

    A Hugging Face id is downloaded, if it is not in the hub's cache.

    Args:
        data: the data set as the recipe describes it.
        place: where that is in the recipe.
        resolve: returns the path of what the recipe names.
    """
    try:
        names = split_names(data.split)
    except DataError as error:
        return Path(data.path), [Problem(f"{place}.split", str(error))]
    try:
        path = resolve(data.path)
        hub = is_data_set_id(data.path) and not path.exists()
        if data.file is not None:
            if mistake := _outside(data.file):
                return path, [Problem(f"{place}.file", mistake)]
            resolve(str(path / data.file))  # fails for a name that is too long
        if hub:
            path = fetch_data_set(data.path, data.revision, path, data.file)
    except SqftError as error:
        return Path(data.path), [Problem(f"{place}.path", str(error))]
    problems = list(_settings(data, place, path, hub, names))
    if data.file is None:
        return path, problems or ([] if hub else list(check_file(path, f"{place}.path", path.is_dir())))
    problems = problems or ([] if hub else list(check_file(path, f"{place}.path", folder=True)))
    if problems:
        return path / data.file, problems
    if not (path / data.file).is_file():
        offline = ", or it is not in the hub's cache and could not be downloaded" if hub else ""
        return path / data.file, [Problem(f"{place}.file", f"{data.path} has no file '{data.file}'{offline}")]
    return path / data.file, list(check_file(path / data.file, f"{place}.file"))


def _outside(file: str) -> str | None:
    """Return what is wrong with the name of a file in a data set; None when nothing is."""
    pure = PurePosixPath(file)
    inside = not pure.is_absolute() and ".." not in pure.parts and pure.as_posix() == file != "."
    return None if inside else f"'{file}' is no path of a file inside the data set, such as en/part-0.jsonl"


def _settings(data: Data, place: str, path: Path, hub: bool, names: set[str]) -> Iterator[Problem]:
    """Check that a single file is not asked for what only a data set has, and that only a table as text has a
    delimiter; `names` are those of the splits."""
    named = Path(data.path if data.file is None else data.file)
    if data.delimiter is not None and suffix_of(named) not in (".csv", ".tsv"):
        yield Problem(f"{place}.delimiter", f"only .csv and .tsv files have one, and this is {named}; remove this")
    if data.file is not None and path.is_file():
        yield Problem(f"{place}.file", f"{path} is a single file itself; remove this, or name the folder that holds it")
        return
    if data.file is None and not path.is_file():
        return
    only = {"config"} if hub else {"config", "revision"}
    if given := data.model_fields_set & only:
        where = f"{place}.path" if data.file is None else f"{place}.file"
        yield Problem(where, f"is a single file and has no {min(given)}; remove that, or name a data set")
    elif names != {"train"}:
        yield Problem(f"{place}.split", "a single file has only the split 'train', or slices of it (train[:90%])")


def check_plain_text(data: Data, path: Path, place: str) -> Iterator[Problem]:
    """Check that a file is text, as far as its start shows, and is not asked for what only records have."""
    for field in OF_RECORDS:
        if getattr(data, field) != type(data).model_fields[field].get_default(call_default_factory=True):
            yield Problem(f"{place}.{field}", "has no effect on a plain text; remove it, or give a file of records")
    try:
        read_text(path, START)
    except DataError as error:
        yield Problem(f"{place}.{'file' if data.file else 'path'}", f"{error}; formats of records: {SUPPORTED}")


def check_file(path: Path, place: str, folder: bool = False) -> Iterator[Problem]:
    """Check that a file or folder exists, is readable and not empty."""
    if not (path.is_dir() if folder else path.is_file()):
        yield Problem(place, f"there is no {'folder' if folder else 'file'} {path}")
    elif not os.access(path, os.R_OK):
        yield Problem(place, f"{path} may not be read; change its permissions")
    elif not folder and path.stat().st_size == 0:
        yield Problem(place, f"{path} is empty")
