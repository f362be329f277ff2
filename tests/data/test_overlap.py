"""Runs of words that two files share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqft.data.overlap import LIMIT, shared_runs

WORDS = [f"word{number}" for number in range(100)]


def test_the_share_is_that_of_runs_of_13_words(tmp_path: Path) -> None:
    """88 runs, of which those of the first 20 words, 8, are in the other file, a conversation; case does not count."""
    text, other, none = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt"))
    text.write_text(" ".join(WORDS))
    turns = [{"role": "user", "content": ", ".join(WORDS[:20]).upper()}, {"role": "assistant", "content": "No."}]
    other.write_text("not JSON\n" + json.dumps({"messages": turns}) + "\n")
    none.write_text("a b c")
    assert shared_runs(text, other) == pytest.approx(8 / 88)
    assert shared_runs(text, text) == 1 and shared_runs(none, none) == shared_runs(text, none) == 0


def test_only_the_start_of_a_file_is_read(tmp_path: Path) -> None:
    text, rows = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(" ".join(WORDS))
    filler = "x " * (LIMIT // 2)
    rows.write_text("".join(json.dumps({"text": part}) + "\n" for part in (filler, " ".join(WORDS))))
    assert shared_runs(text, rows) == 0
