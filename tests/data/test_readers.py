"""Rows of every format, and slices of splits, against the datasets library."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import ipc, parquet

from sqft.data.readers import read_rows
from sqft.data.records import read_records
from sqft.errors import DataError

PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


ROWS = [{"prompt": f'{n}, "two"\nlines', "completion": f"é{n}"} for n in range(5)]


def write_rows(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"data{suffix}"
    if packed := PACKERS.get(path.suffix):
        plain = write_rows(folder, path.with_suffix("").suffix, rows)
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
    path = write_rows(tmp_path, suffix, ROWS)
    found = read_records(path)
    assert found == ROWS
    assert all(record.location.startswith(str(path)) for record in found)
    assert len({record.location for record in found}) == 5
    assert read_records(path, 2) == ROWS[:2]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_conversations(tmp_path: Path, suffix: str) -> None:
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    assert read_records(write_rows(tmp_path, suffix, rows)) == rows


@pytest.mark.parametrize(
    ("name", "delimiter"), [("d.tsv", None), ("d.csv", ";"), ("d.csv", "\t"), ("d.tsv", "|"), ("d.csv.gz", ";")]
)
def test_cells_between_other_marks(tmp_path: Path, name: str, delimiter: str | None) -> None:
    """Quoted cells may hold any mark, and a slice reads the same rows."""
    import csv
    import io

    rows = [{"prompt": f'{n}; "a"\tb|c,', "completion": "x;\ny"} for n in range(4)]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter or "\t")
    writer.writeheader(), writer.writerows(rows)
    content = text.getvalue().encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    assert read_records(tmp_path / name, delimiter=delimiter) == rows
    assert read_records(tmp_path / name, split="train[1:3]", delimiter=delimiter) == rows[1:3]


@pytest.mark.parametrize(
    ("name", "head", "found"),
    [
        ("d.csv", "prompt;completion", '";"'),
        ("d.csv", "prompt\tcompletion", '"\\t"'),
        ("d.tsv", "prompt,completion", '","'),
        ("d.csv", '"prompt";"completion"', '";"'),
        ("d.csv", "prompt\tcompletion;x\tid", '"\\t"'),
    ],
)
def test_a_table_that_is_not_split_says_how(tmp_path: Path, name: str, head: str, found: str) -> None:
    (tmp_path / name).write_text(f"{head}\na;b\n")
    with pytest.raises(DataError) as caught:
        read_records(tmp_path / name)
    assert "has the single column" in str(caught.value)
    assert f'set "delimiter": {found} beside its path, or ' in str(caught.value)


def test_one_column_whose_name_holds_a_mark(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text;\na\nb;c\n")
    rows = [row for _, row in read_rows(tmp_path / "d.csv", None, "train", ",")]
    assert rows == [{"text;": "a"}, {"text;": "b;c"}]


def test_a_quote_that_is_not_doubled_is_named_by_its_line(tmp_path: Path) -> None:
    (tmp_path / "d.tsv").write_text('prompt\tcompletion\n"Yes," he said.\tb\n')
    with pytest.raises(DataError, match=r"d\.tsv:2: not valid CSV: .* each quote inside is written twice"):
        read_records(tmp_path / "d.tsv")


def test_a_single_column_is_a_table_too(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("text\na;b\n")
    assert read_records(tmp_path / "d.csv") == [{"text": "a;b"}]


def test_json_lines_by_another_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ".jsonl", ROWS).rename(tmp_path / "lines.json")
    assert read_records(path) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("d.csv", b"prompt,completion\na\n", "d.csv:2: the row has fewer cells than the header, which has 2"),
        ("d.csv", b"prompt,completion\na,b,c\n", "has more cells"),
        ("d.csv", b'prompt,completion\n"a,b\n', "not valid CSV: unexpected end"),
        ("d.csv", b"prompt,completion\n\xff,b\n", "not UTF-8"),
        (
            "d.csv",
            b"question,answer\na,b\n",
            "'text' is missing; the record has 'question', 'answer'; a prompt template can map",
        ),
        ("d.csv", b"", "has no records"),
        ("d.json", b"[{]", "d.json: not valid JSON"),
        ("d.json", b"[1]", "d.json, record 1: expected a JSON object"),
        ("d.parquet", b"PAR1 not really", "is not a complete Parquet file"),
        ("d.parquet", b"", "is not a complete Parquet file"),
        ("d.arrow", b"ARROW1 not really", "is not a complete Arrow file"),
        ("d.arrow", b"", "is not a complete Arrow file"),
        ("d.txt", b"\xff\xfe", "d.txt: not UTF-8 text"),
        ("d.jsonl.gz", b"{}", "d.jsonl.gz cannot be read: Not a gzipped file"),
        ("d.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 9, mtime=0)[:-9], "d.jsonl.gz cannot be decompressed"),
        ("d.csv.xz", lzma.compress(b"text\na\n")[:-9], "d.csv.xz cannot be decompressed"),
        ("d.txt.xz", b"plain", "d.txt.xz cannot be decompressed"),
        (
            "d.xlsx",
            b"PK\x03\x04\xff",
            r"has no supported suffix \(.jsonl, .json, .csv, .tsv and .txt, also compressed \(.gz, .bz2, .xz",
        ),
        ("d.data", b'{"text": "a"}\n[', "d.data:2: not valid JSON"),
    ],
)
def test_a_bad_file(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_records(tmp_path / name)


SLICES = [
    "train[:3]", "train[2:]", "train[-2:]", "train[:-4]", "train[2:4]", "train[:50]", "train[:10%]",
    "train[25%:75%]", "train[-30%:]", "train[-12:2]", "test+train[:2]", "train[4:6] + train[:1]", "train + test[:1]",
    "train[10%:20]", "train[1_0:]",
]  # fmt: skip


@pytest.fixture(scope="module")
def split_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    for split, count in (("train", 13), ("test", 3)):
        write_rows(folder, ".jsonl", [{"text": f"{split} {n}"} for n in range(count)]).rename(folder / f"{split}.jsonl")
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
        ("train[:10", r"Unrecognized instruction format: train\[:10; write slices as datasets does: train\[:100\]"),
        ("train[5]", "Unrecognized"),
        ("train[:200%]", "Percent slice boundaries"),
        ("train[:10](closest)", "forbidden to specify rounding"),
        ("train[:10%](pct1_dropremainder)", "cannot be taken: .*less than 100"),
        ("other[:1]", "cannot read split 'other'"),
        ("train[50:]", r"set0, split 'train\[50:\]', has no records"),
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
    assert [record.location for record in found] == [f"{path}:{line}" for line in (1, 4, 5)]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".json.bz2", ".csv.xz", ".arrow", ".file.arrow"])
def test_a_folder_of_such_files(tmp_path: Path, suffix: str) -> None:
    write_rows(tmp_path, suffix, ROWS).rename(tmp_path / f"train-00000-of-00001{suffix}")
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
    with pytest.raises(DataError, match="no split 'dev'; its splits: test, train"):
        read_records(tmp_path / "both", split="dev")
    with pytest.raises(DataError, match="saved as a single data set: its only split is 'train'"):
        read_records(tmp_path / "one", split="test")


def test_a_folder_without_data_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "train.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"has no data file; supported formats: \.jsonl, .* \.parquet and \.arrow"):
        read_records(tmp_path)


def test_json_lines_by_the_name_of_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text('{"prompt": "a", "completion": "b"}\n')
    with pytest.raises(DataError, match=r"each line of a \.txt file is read as plain text; rename it to \.jsonl"):
        read_records(tmp_path / "a.txt")


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0cb\x0bc\x1cd"]
    file = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_bytes("\ufeff".encode() + "\n".join(lines).encode())
    assert [record["text"] for record in read_records(file)] == texts
