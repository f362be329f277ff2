"""Runs of words that two files share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sqft.data import overlap
from sqft.data.overlap import shared_records, shared_runs
from sqft.recipe.data import CalibrationData, Data

WORDS = [f"word{number}" for number in range(100)]


def test_the_share_is_that_of_runs_of_13_words(tmp_path: Path) -> None:
    """88 runs, of which those of the first 20 words, 8, are in the other file, a conversation; case does not count."""
    text, other, none = (tmp_path / name for name in ("a.txt", "b.jsonl", "c.txt"))
    text.write_text(" ".join(WORDS))
    turns = [{"role": "user", "content": ", ".join(WORDS[:20]).upper()}, {"role": "assistant", "content": "No."}]
    other.write_text("not JSON\n" + json.dumps({"messages": turns}) + "\n")
    none.write_text("a b c")
    assert shared_runs([(text, None), (none, None)], other) == [pytest.approx(8 / 88), 0]
    assert shared_runs([(text, None)], text) == [1]
    assert shared_runs([(none, None)], none) == shared_runs([(text, None)], none) == [0] and shared_runs([], text) == []


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
    whole, start = shared_runs([(text, None), (text, len(" ".join(WORDS)) // 4)], other)
    assert whole == pytest.approx(88 / runs) and start > 0.98
    monkeypatch.setattr(overlap, "OTHER_LIMIT", 20_000)
    assert shared_runs([(text, None)], other) == [0]


def test_only_the_rows_that_calibration_reads_count(tmp_path: Path) -> None:
    text, other = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(" ".join(WORDS))
    other.write_text("".join(json.dumps({"body": part}) + "\n" for part in ("x", " ".join(WORDS), "y")))
    for how, share in ({"limit": 1}, 0), ({"limit": 2}, 1), ({"split": "train[2:]"}, 0), ({"split": "train[:2]"}, 1):
        assert shared_runs([(text, None)], other, CalibrationData.model_validate({"path": "b.jsonl", **how})) == [share]


def test_a_run_goes_on_in_the_next_row(tmp_path: Path) -> None:
    """The names of the fields come between no two rows."""
    text, other = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text(" ".join(WORDS))
    lines = [" ".join(WORDS[start : start + 5]) for start in range(0, 100, 5)]
    other.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    assert shared_runs([(text, None)], other) == [1]


def as_data(**settings: object) -> Data:
    return Data.model_validate({"path": "a.jsonl", **settings})


def test_records_that_two_data_sets_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other fields and completions they have, and whichever file they come from."""
    sums = [{"prompt": f"{n}+1=", "completion": str(n + 1), "id": n} for n in range(6)]
    chat = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
    files = {
        "a": [*sums[:4], chat],
        "b": [{**sums[0], "id": 9, "completion": "x"}, {**sums[5], "prompt": " 5+1= "}],
        "c": [sums[3], chat],
    }
    paths = {name: tmp_path / f"{name}.jsonl" for name in files}
    for name, records in files.items():
        paths[name].write_text("".join(json.dumps(record) + "\n" for record in records))
    a, b, c = ((path, as_data()) for path in paths.values())
    assert shared_records(a, [b]) == (1, 5) and shared_records(a, [b, c]) == (3, 5) and shared_records(a, [a]) == (5, 5)
    assert shared_records(b, [c]) == (0, 2) and shared_records(a, []) == (0, 5)
    assert shared_records((paths["a"], as_data(limit=2)), [b]) == (1, 2)
    monkeypatch.setattr(overlap, "LARGEST", 100)  # only b is no larger
    assert shared_records(b, [a]) == (0, 2) and shared_records(a, [b]) == (0, 1) and shared_records(a, [a]) == (1, 1)
    assert shared_records(a, [(paths["a"], as_data(split="train[:1]"))]) == (0, 1)
