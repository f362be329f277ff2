"""Runs of words that two files share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqft.data import overlap
from sqft.data.overlap import shared_runs

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


@pytest.mark.parametrize("name", ["b.txt", "b.jsonl"])
def test_how_much_of_each_file_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The text's start, or as much as the tokens take that are measured; far more of the other file."""
    monkeypatch.setattr(overlap, "BLOCK", 10)
    monkeypatch.setattr(overlap, "LIMIT", 2000)
    text, other = tmp_path / "a.txt", tmp_path / name
    text.write_text(" ".join(WORDS) + " y" * 2000)
    parts = ["x " * 10_000, "\n".join(WORDS)]
    other.write_text("".join(parts) if name == "b.txt" else "".join(json.dumps({"text": p}) + "\n" for p in parts))
    runs = len(text.read_text()[:2000].split()) - 12
    assert shared_runs(text, other) == pytest.approx(88 / runs)
    assert shared_runs(text, other, len(" ".join(WORDS)) // 4) > 0.98
    monkeypatch.setattr(overlap, "OTHER_LIMIT", 20_000)
    assert shared_runs(text, other) == 0
