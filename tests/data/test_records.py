"""Rows become records, which are split, repeated and named in errors."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from sqft.data.records import Record, read_records, records_of, repeated, split_off
from sqft.data.templates import TEMPLATES, BuiltinTemplate
from sqft.errors import DataError


def write_jsonl(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "d.jsonl:2: not valid JSON"),
        ("[1]", "d.jsonl:2: expected a JSON object with 'prompt' and 'completion'.*found list"),
        ('{"prompt": "a"}', "d.jsonl:2: .*'completion' is missing"),
        ('{"prompt": "a", "completion": 4}', "'completion' is not text"),
        ('{"question": "a"}', "'text' is missing"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "at least one assistant turn"),
        ('{"text": "half a character: \\ud83d"}', "'text' is not text"),
        ("[" * 100_000, "d.jsonl:2: not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_records(file)


def test_empty_and_limited_files(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match="has no records"):
        read_records(file)
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_records(file, 1) == [{"text": "a"}]
    file.write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n{\n\xff\n')
    assert read_records(file, 2) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"d\.jsonl:4: not valid JSON(.|\n)*d\.jsonl:5: not UTF-8"):
        read_records(file, 4)
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        read_records(tmp_path / "gone.jsonl")


def test_instructions_need_no_template(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3", "answer": "3"},
        {"instruction": "Hi", "output": "x"},
    ]
    with_input, without = read_records(write_jsonl(tmp_path, rows))
    assert with_input["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    assert without["prompt"].endswith("### Instruction:\nHi\n\n### Response:\n")
    assert (with_input["completion"], without["completion"]) == ("3", "x")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, [{"q": "2 + 2?", "a": 4.0}, {"q": "1 / 2?", "a": 0.5}])
    template = BuiltinTemplate("{{q}}\n", "{{a}}")
    assert [dict(r) for r in read_records(path, template=template)] == [
        {"prompt": "2 + 2?\n", "completion": "4"},
        {"prompt": "1 / 2?\n", "completion": "0.5"},
    ]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (BuiltinTemplate("{{question}}", "{{a}}"), r"data.jsonl:1: .*'question' is undefined; the record has 'q', 'a'"),
        (BuiltinTemplate("{{q}}", "{{a[7]}}"), "data.jsonl:1: the prompt template"),
        (BuiltinTemplate("{{q}}", "{{a / 0}}"), "data.jsonl:1: the prompt template cannot be filled"),
        (
            BuiltinTemplate("{{q.__class__.__mro__}}", "{{a}}"),
            "data.jsonl:1: the prompt template cannot be filled: SecurityError",
        ),
    ],
)
def test_a_template_that_does_not_fit(tmp_path: Path, template: BuiltinTemplate, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_records(write_jsonl(tmp_path, [{"q": "x", "a": 1}]), template=template)


def test_a_folder_is_a_data_set_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        table = pyarrow.Table.from_pylist([{"question": f"{split} {n}", "answer": str(n)} for n in range(count)])
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    options = SimpleNamespace(limit=None, prompt=TEMPLATES["gsm8k"], config=None, split="test", delimiter=None)
    assert [dict(r) for r in records_of(folder, options)] == [
        {"prompt": f"Question: test {n}\nAnswer:", "completion": f" {n}"} for n in range(2)
    ]
    with pytest.raises(DataError, match="cannot read split 'validation'"):
        records_of(folder, SimpleNamespace(limit=None, prompt=None, config=None, split="validation", delimiter=None))


def records(count: int) -> list[Record]:
    return [Record({"text": str(n)}) for n in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 60), st.floats(0.01, 0.99), st.integers(0, 5), st.integers(2, 60))
def test_a_split_loses_and_doubles_nothing(count: int, fraction: float, seed: int, fewer: int) -> None:
    kept, held = split_off(records(count), fraction, seed)
    assert kept and held
    assert sorted([*kept, *held], key=lambda r: int(r["text"])) == records(count)
    assert (kept, held) == split_off(records(count), fraction, seed)
    # Fewer of the same file: what both know is on the same side, but where one side had to be filled.
    some, out = split_off(records(min(fewer, count)), fraction, seed)
    odd = [r for r in out if r in kept] + [r for r in some if r in held]
    assert len(odd) <= 2


def test_about_the_fraction_is_held_out() -> None:
    _, held = split_off(records(4000), 0.25, 0)
    assert 900 < len(held) < 1100  # 1000, with a standard deviation of 27


def test_no_split() -> None:
    assert split_off(records(3), 0, 0) == (records(3), [])
    with pytest.raises(DataError, match="one record cannot be split"):
        split_off(records(1), 0.5, 0)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.floats(0.01, 4))
def test_weights(count: int, weight: float) -> None:
    if round(weight * count) == 0 and weight < 1:
        with pytest.raises(DataError, match="selects none"):
            repeated(records(count), weight, Random(0))
        return
    found = [record["text"] for record in repeated(records(count), weight, Random(0))]
    assert len(found) == int(weight) * count + round((weight % 1) * count)
    assert all(int(weight) <= found.count(str(n)) <= int(weight) + 1 for n in range(count))


def test_a_conversation_stays_one(tmp_path: Path) -> None:
    row = {"instruction": "x", "output": "y", "messages": [{"role": "assistant", "content": "b"}]}
    assert read_records(write_jsonl(tmp_path, [row])) == [row]


@pytest.mark.parametrize(
    ("name", "row", "words"),
    [
        ("llm-adapters", {"instruction": "x", "output": None}, "'output' is undefined"),
        ("multiple-choice", {"question": "x", "choices": ["a", "b"], "answer": "B"}, "cannot be filled: ValueError"),
        ("piqa", {"goal": "x", "sol1": "a", "sol2": "b", "label": -1}, "there is no choice -1 of 2"),
        ("winogrande", {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": ""}, "cannot be filled"),
    ],
)
def test_an_answer_that_is_not_there_is_no_answer(tmp_path: Path, name: str, row: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_records(write_jsonl(tmp_path, [row]), template=TEMPLATES[name])
