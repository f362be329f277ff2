"""Which files of a Hugging Face data set are downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sqft.data.hub import DATA_FILES, TEXT_FILES, fetch_data_set


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """The patterns of every download, which all find the folder `tmp_path`."""
    calls: list[tuple[Any, ...]] = []

    def fetch(kind: str, name: str, revision: str | None, patterns: tuple[str, ...], local: Path) -> Path:
        assert (kind, name, revision, local) == ("dataset", "owner/name", "v1", Path("owner/name"))
        calls.append(patterns)
        return tmp_path

    monkeypatch.setattr("sqft.data.hub.fetch", fetch)
    return calls


CARD = "---\nconfigs:\n- data_files: train.{}\n---\nSee LICENSE.txt."


@pytest.mark.parametrize(
    ("files", "texts"),
    [
        ({"train.jsonl": "{}"}, False),
        ({"train.jsonl": "{}", "README.md": CARD.format("jsonl")}, False),
        ({"train.jsonl": "{}", "README.md": CARD.format("txt")}, True),
        ({"README.md": "No settings.", "dataset_info.json": "{}"}, True),
        ({}, True),
    ],
)
def test_texts_are_downloaded_where_they_are_the_data(
    tmp_path: Path, asked: list[tuple[Any, ...]], files: dict[str, str], texts: bool
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert fetch_data_set("owner/name", "v1", Path("owner/name")) == tmp_path
    assert asked == [DATA_FILES, *([(*DATA_FILES, *TEXT_FILES)] if texts else [])]


def test_no_code_is_downloaded() -> None:
    assert not {"*", "*.py", "*.bin", "*.pt"} & {*DATA_FILES, *TEXT_FILES}
