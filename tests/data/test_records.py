"""Records in every format, mixed and split."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import datasets
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from sqft.data.records import Record, read_records, records_of, repeated, split_off
from sqft.data.templates import TEMPLATES, Named
from sqft.errors import DataError

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ROWS = [{"prompt": f'{n}, "two"\nlines', "completion": f"é{n}"} for n in range(5)]


def written(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"data{suffix}"
    if packed := PACKERS.get(path.suffix):
        plain = written(folder, path.with_suffix("").suffix, rows)
        path.write_bytes(packed(plain.read_bytes()))
        plain.unlink()
    elif suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif suffix in (".arrow", ".file.arrow"):
        table = pyarrow.Table.from_pylist(rows)
        make = ipc.new_stream if suffix == ".arrow" else ipc.new_file
        with make(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    elif suffix == ".csv":
        import csv

        with path.open("w", encoding="utf-8", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif suffix == ".json":
        path.write_text(json.dumps(rows, indent=1))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "suffix",
    [
        ".jsonl",
        ".json",
        ".csv",
        ".parquet",
        ".data",
        ".arrow",
        ".file.arrow",
        ".jsonl.gz",
        ".json.gz",
        ".csv.gz",
        ".jsonl.bz2",
        ".csv.xz",
    ],
)
def test_every_format_says_the_same(tmp_path: Path, suffix: str) -> None:
    path = written(tmp_path, suffix, ROWS)
    found = read_records(path)
    assert found == ROWS
    assert all(record.place.startswith(str(path)) for record in found)
    assert len({record.place for record in found}) == 5
    assert read_records(path, 2) == ROWS[:2]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_conversations(tmp_path: Path, suffix: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert read_records(written(tmp_path, suffix, rows)) == rows


def test_json_lines_by_another_name(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl", ROWS).rename(tmp_path / "lines.json")
    assert read_records(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", b"prompt,completion\na\n", "d.csv:2: the row has fewer cells than the 2 heads|than its 2 heads"),
        ("d.csv", b"prompt,completion\na,b,c\n", "has more cells"),
        ("d.csv", b'prompt,completion\n"a,b\n', "not valid CSV: unexpected end"),
        ("d.csv", b"prompt,completion\n\xff,b\n", "not UTF-8"),
        (
            "d.csv",
            b"question,answer\na,b\n",
            "'text' is missing; it has 'question', 'answer': a prompt template may fit",
        ),
        ("d.csv", b"", "holds no record"),
        ("d.json", b"[{]", "d.json: not valid JSON"),
        ("d.json", b"[1]", "d.json, record 1: expected a JSON object"),
        ("d.parquet", b"PAR1 not really", "no whole Parquet file"),
        ("d.parquet", b"", "no whole Parquet file"),
        ("d.arrow", b"ARROW1 not really", "no whole Arrow file"),
        ("d.arrow", b"", "no whole Arrow file"),
        ("d.txt", b"\xff\xfe", "d.txt: not UTF-8 text"),
        ("d.jsonl.gz", b"{}", "d.jsonl.gz cannot be read: Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9)[:-9], "d.jsonl.gz cannot be decompressed"),
        ("d.csv.xz", lzma.compress(b"text\na\n")[:-9], "d.csv.xz cannot be decompressed"),
        ("d.txt.xz", b"plain", "d.txt.xz cannot be decompressed"),
        (
            "d.xlsx",
            b"PK\x03\x04\xff",
            r"known by name \(.jsonl, .json, .csv and .txt, also compressed \(.gz, .bz2, .xz",
        ),
        ("d.data", b'{"text": "a"}\n[', "d.data:2: not valid JSON"),
    ],
)
def test_a_bad_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_records(tmp_path / name)


def test_instructions_need_no_template(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3", "answer": "3"},
        {"instruction": "Hi", "output": "x"},
    ]
    with_input, without = read_records(written(tmp_path, ".jsonl", rows))
    assert with_input["prompt"].endswith("### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:\n")
    assert without["prompt"].endswith("### Instruction:\nHi\n\n### Response:\n")
    assert (with_input["completion"], without["completion"]) == ("3", "x")


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = written(tmp_path, ".jsonl", [{"q": "2 + 2?", "a": 4.0}, {"q": "1 / 2?", "a": 0.5}])
    template = Named("{{q}}\n", "{{a}}")
    assert [dict(r) for r in read_records(path, template=template)] == [
        {"prompt": "2 + 2?\n", "completion": "4"},
        {"prompt": "1 / 2?\n", "completion": "0.5"},
    ]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (Named("{{question}}", "{{a}}"), r"data.jsonl:1: .*'question' is undefined; it has 'q', 'a'"),
        (Named("{{q}}", "{{a[7]}}"), "data.jsonl:1: the prompt template"),
        (Named("{{q}}", "{{a / 0}}"), "data.jsonl:1: the prompt template cannot be filled"),
        (
            Named("{{q.__class__.__mro__}}", "{{a}}"),
            "data.jsonl:1: the prompt template cannot be filled: SecurityError",
        ),
    ],
)
def test_a_template_that_does_not_fit(tmp_path: Path, template: Named, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_records(written(tmp_path, ".jsonl", [{"q": "x", "a": 1}]), template=template)


def test_a_folder_is_a_data_set_with_splits(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 3), ("test", 2)):
        table = pyarrow.Table.from_pylist([{"question": f"{split} {n}", "answer": str(n)} for n in range(count)])
        parquet.write_table(table, folder / "data" / f"{split}-00000-of-00001.parquet")
    how = SimpleNamespace(limit=None, prompt=TEMPLATES["gsm8k"], config=None, split="test")
    assert [dict(r) for r in records_of(folder, how)] == [
        {"prompt": f"Question: test {n}\nAnswer:", "completion": f" {n}"} for n in range(2)
    ]
    with pytest.raises(DataError, match="cannot read split 'validation'"):
        records_of(folder, SimpleNamespace(limit=None, prompt=None, config=None, split="validation"))


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
        with pytest.raises(DataError, match="draws none"):
            repeated(records(count), weight, Random(0))
        return
    found = [record["text"] for record in repeated(records(count), weight, Random(0))]
    assert len(found) == int(weight) * count + round((weight % 1) * count)
    assert all(int(weight) <= found.count(str(n)) <= int(weight) + 1 for n in range(count))


def test_a_conversation_stays_one(tmp_path: Path) -> None:
    row = {"instruction": "x", "output": "y", "messages": [{"role": "assistant", "content": "b"}]}
    assert read_records(written(tmp_path, ".jsonl", [row])) == [row]


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
        read_records(written(tmp_path, ".jsonl", [row]), template=TEMPLATES[name])


SLICES = [
    "train[:3]", "train[2:]", "train[-2:]", "train[:-4]", "train[2:4]", "train[:50]", "train[:10%]",
    "train[25%:75%]", "train[-30%:]", "train[-12:2]", "test+train[:2]", "train[4:6] + train[:1]", "train + test[:1]",
    "train[10%:20]", "train[1_0:]",
]  # fmt: skip


@pytest.fixture(scope="module")
def split_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for split, count in (("train", 13), ("test", 3)):
        written(folder, ".jsonl", [{"text": f"{split} {n}"} for n in range(count)]).rename(folder / f"{split}.jsonl")
    return folder


@pytest.mark.parametrize("split", SLICES)
def test_slices_are_those_of_datasets(split_set: Path, tmp_path: Path, split: str) -> None:
    wanted = datasets.ReadInstruction.from_spec(split)
    files = {name: str(split_set / f"{name}.jsonl") for name in ("train", "test")}
    whole = datasets.load_dataset("json", data_files=files, split=wanted, cache_dir=str(tmp_path))
    assert read_records(split_set, split=split) == list(whole)
    assert read_records(split_set, 1, split=split) == list(whole)[:1]
    if "test" not in split:
        assert read_records(split_set / "train.jsonl", split=split) == list(whole)


def test_a_slice_that_needs_no_more_reads_no_more(split_set: Path, tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text((split_set / "train.jsonl").read_text() + "no JSON")
    assert len(read_records(path, split="train[2:5]")) == 3
    with pytest.raises(DataError, match=r"train\.jsonl:14: not valid JSON"):
        read_records(path, split="train[10:]")


@pytest.mark.parametrize(
    ("split", "words"),
    [
        ("train[:10", r"Unrecognized instruction format: train\[:10; write as datasets does: train\[:100\]"),
        ("train[5]", "Unrecognized"),
        ("train[:200%]", "Percent slice boundaries"),
        ("train[:10](closest)", "forbidden to specify rounding"),
        ("train[:10%](pct1_dropremainder)", "cannot be taken: .*less than 100"),
        ("other[:1]", "cannot read split 'other'"),
        ("train[50:]", r"set0, split 'train\[50:\]', holds no record"),
    ],
)
def test_a_slice_that_is_none(split_set: Path, split: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_records(split_set, split=split)


@pytest.mark.parametrize("suffix", [".txt", ".txt.gz"])
def test_lines_of_a_text(tmp_path: Path, suffix: str) -> None:
    content = "\ufeffone\n\n  \r\n two\u2028 \r\nthree".encode()
    path = tmp_path / f"train{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith(".gz") else content)
    found = read_records(path)
    assert [record["text"] for record in found] == ["one", " two\u2028 ", "three"]
    assert [record.place for record in found] == [f"{path}:{line}" for line in (1, 4, 5)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.bz2", ".csv.xz", ".arrow", ".file.arrow"])
def test_a_folder_of_such_files(tmp_path: Path, suffix: str) -> None:
    written(tmp_path, suffix, ROWS).rename(tmp_path / f"train-00000-of-00001{suffix}")
    assert read_records(tmp_path) == ROWS


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("one\n\ntwo\n")
    assert [dict(record) for record in read_records(tmp_path)] == [{"text": "one"}, {"text": "two"}]


def test_what_datasets_saved(tmp_path: Path) -> None:
    one, two = datasets.Dataset.from_list(ROWS), datasets.Dataset.from_list(ROWS[:2])
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=one, test=two).save_to_disk(tmp_path / "both")
    assert read_records(tmp_path / "one") == ROWS
    assert read_records(tmp_path / "both", split="test") == ROWS[:2]
    assert read_records(tmp_path / "both", split="train[-1:]+test") == [ROWS[-1], *ROWS[:2]]
    with pytest.raises(DataError, match="no split 'dev'; it has test, train"):
        read_records(tmp_path / "both", split="dev")
    with pytest.raises(DataError, match="saved as one data set, and has no split but 'train'"):
        read_records(tmp_path / "one", split="test")


def test_a_folder_without_data_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"holds no file that is read as data: \.jsonl, .* \.parquet and \.arrow"):
        read_records(tmp_path)


def test_json_lines_by_the_name_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"each line of a \.txt is a text; name it \.jsonl"):
        read_records(tmp_path / "a.txt")
