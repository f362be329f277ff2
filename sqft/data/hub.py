"""Data sets on the Hugging Face hub, downloaded as files of records."""

from __future__ import annotations

import glob
from pathlib import Path

from sqft.data.readers import SUFFIXES, suffix_of
from sqft.utils.hub import HUB_ID, fetch

COMPRESSIONS = ("", ".gz", ".bz2", ".xz")

DATA_FILES = (
    "*.parquet",
    "*.arrow",
    *(f"*.{kind}{packed}" for kind in ("jsonl", "json", "csv") for packed in COMPRESSIONS),
    "README.md",
)
"""The files of a data set that are downloaded; its card, README.md, says which file belongs to which split."""

TEXT_FILES = tuple(f"*.txt{packed}" for packed in COMPRESSIONS)
"""Files that are downloaded too when the card names one, or when there is no other data. Otherwise a licence or a list
of requirements would be taken for data."""

NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files that describe the data and hold none."""


def is_data_set_id(path: str) -> bool:
    """Return whether a path may be the id of a data set: two names, and no suffix of a file of records."""
    return bool(HUB_ID.fullmatch(path)) and suffix_of(Path(path)) not in SUFFIXES


def fetch_data_set(name: str, revision: str | None, local: Path, file: str | None = None) -> Path:
    """Return the folder of a Hugging Face data set in the hub's cache, downloading it when needed; never its code.

    Args:
        name: its id, "owner/name".
        revision: branch, tag or commit; None for the main branch.
        local: the folder that was looked for, for messages.
        file: the only file of it that is needed; None for all its data.

    Raises:
        SqftError: when it is not in the cache and cannot be downloaded.
    """
    if file is not None:
        return fetch("dataset", name, revision, (glob.escape(file),), local)
    folder = fetch("dataset", name, revision, DATA_FILES, local)
    card = folder / "README.md"
    settings = card.read_text("utf-8", "replace").split("\n---", 1)[0] if card.is_file() else ""
    if ".txt" in settings or not any(file.is_file() and file.name not in NO_DATA for file in folder.rglob("*")):
        folder = fetch("dataset", name, revision, (*DATA_FILES, *TEXT_FILES), local)
    return folder
