"""Data sets of the Hugging Face hub, fetched as files of records."""

from __future__ import annotations

from pathlib import Path

from sqft.utils.hub import fetched

PACKED = ("", ".gz", ".bz2", ".xz")


DATA_FILES = [
    "*.parquet",
    "*.arrow",
    *(f"*.{kind}{packed}" for kind in ("jsonl", "json", "csv") for packed in PACKED),
    "README.md",
]
"""What is fetched of a data set; its card says which file belongs to which split."""


TEXT_FILES = [f"*.txt{packed}" for packed in PACKED]
"""What is fetched of a data set besides, where its card names such a file or there is no other: a licence or a list of
requirements would be taken for data."""


NO_DATA = {"README.md", "config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
"""Files of these names say something of the data."""


def hub_data(name: str, revision: str | None, place: Path) -> Path:
    """The folder of a Hugging Face data set in the hub's cache, fetched when it is not there: never its code.

    Raises:
        SqftError: when it cannot be had.
    """
    folder = fetched(name, revision, place, "data set", DATA_FILES)
    card = folder / "README.md"
    settings = card.read_text("utf-8", "replace").split("\n---", 1)[0] if card.is_file() else ""
    if ".txt" in settings or not any(file.is_file() and file.name not in NO_DATA for file in folder.rglob("*")):
        folder = fetched(name, revision, place, "data set", [*DATA_FILES, *TEXT_FILES])
    return folder
