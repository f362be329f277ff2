"""Records become the tokens they should, and answers compare as people would."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sqft.data.batches import Collator, calibration_windows, text_windows
from sqft.data.prompts import IGNORED, answer_of, encode, encode_all, prompt_ids, read_records
from sqft.errors import DataError


def test_completion_carries_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    example, cut = encode({"prompt": "2+2=", "completion": "4"}, tokenizer, 32, "completion")
    assert cut == 0
    assert tokenizer.decode(example.input_ids) == "2+2=4<|im_end|>"
    assert [label for label in example.labels if label != IGNORED] == list(example.input_ids[-2:])
    assert prompt_ids({"prompt": "2+2=", "completion": "4"}, tokenizer) == (list(example.input_ids[:-2]), "4")
    everything, _ = encode({"prompt": "2+2=", "completion": "4"}, tokenizer, 32, "all")
    assert everything.labels == everything.input_ids


def test_long_prompts_lose_their_start(tokenizer: PreTrainedTokenizerFast) -> None:
    example, cut = encode({"prompt": "abcdefghij", "completion": "XY"}, tokenizer, 8, "completion")
    assert cut == 5 and tokenizer.decode(example.input_ids) == "fghijXY<|im_end|>"
    example, cut = encode({"prompt": "ab", "completion": "0123456789"}, tokenizer, 8, "completion")
    assert tokenizer.decode(example.input_ids) == "b0123456" and cut == 5
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "abcdefghij", "completion": "XY"}]
    encoded = encode_all(records, tokenizer, 8, "completion")
    assert (encoded.truncated, encoded.tokens_cut) == (1, 5)


def test_only_the_assistants_turns_carry_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    example, _ = encode(record, tokenizer, 500, "completion")
    kept = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(kept) == "yes<|im_end|>\nno<|im_end|>\n"
    ids, reference = prompt_ids(record, tokenizer)
    assert reference == "no" and tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_text_and_nothing_to_learn(tokenizer: PreTrainedTokenizerFast) -> None:
    example, _ = encode({"text": "ab"}, tokenizer, 8, "completion")
    assert example.labels == example.input_ids and len(example.labels) == 3
    with pytest.raises(DataError, match="record 1 has no token to learn from"):
        encode_all([{"prompt": "a", "completion": ""}], tokenizer, 8, "completion")
    with pytest.raises(DataError, match="no completion"):
        prompt_ids({"text": "a"}, tokenizer)


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
    with pytest.raises(DataError, match="holds no record"):
        read_records(file)
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_records(file, 1) == [{"text": "a"}]
    file.write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n{\n\xff\n')
    assert read_records(file, 2) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"d\.jsonl:4: not valid JSON(.|\n)*d\.jsonl:5: not UTF-8"):
        read_records(file, 3)
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        read_records(tmp_path / "gone.jsonl")


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0cb\x0bc\x1cd"]
    file = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_bytes("\ufeff".encode() + "\n".join(lines).encode())
    assert [record["text"] for record in read_records(file)] == texts


@pytest.mark.parametrize(
    ("text", "mode", "answer"),
    [
        (" 46\n", "text", "46"),
        ("It is 1,234.50 or 7", "first_number", "1234.5"),
        ("It is 1,234.50 or 7.0", "last_number", "7"),
        ("-0", "first_number", "0"),
        ("-0.0", "first_number", "0"),
        ("12.", "first_number", "12"),
        ("007.10", "first_number", "7.1"),
        ("-12,345,678", "first_number", "-12345678"),
        ("-$5", "first_number", "-5"),
        ("−5", "first_number", "-5"),
        (".5", "first_number", "0.5"),
        ("wait...5", "first_number", "5"),
        ("1,2,3", "first_number", "1"),
        ("1,2,3", "last_number", "3"),
        ("1,2345", "last_number", "2345"),
        ("x2", "first_number", "2"),
        ("GPT-4", "first_number", "4"),
        ("10-5", "last_number", "5"),
        ("10 - -5", "last_number", "-5"),
        ("2024-05-12", "last_number", "12"),
        ("f(3)-4", "last_number", "4"),
        ("none", "first_number", ""),
        ("100", "first_number", "100"),
    ],
)
def test_answers(text: str, mode: Any, answer: str) -> None:
    assert answer_of(text, mode) == answer


def test_batches_are_padded_right() -> None:
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [4, -100, -100]]


def test_windows(tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    one, same = (calibration_windows(data / "calibration.jsonl", tokenizer, 4, 32, 7) for _ in range(2))
    assert one.shape == (4, 32) and torch.equal(one, same)
    assert not torch.equal(one, calibration_windows(data / "calibration.jsonl", tokenizer, 4, 32, 8))
    with pytest.raises(DataError, match=r"999 windows of 32 need 31968; set calibration\.samples to at most \d+"):
        calibration_windows(data / "calibration.jsonl", tokenizer, 999, 32, 7)
    windows = text_windows(data / "heldout.txt", tokenizer, 70, 32)
    assert [len(window) for window in windows] == [32, 32, 6]
    assert len(text_windows(data / "heldout.txt", tokenizer, 65, 32)) == 2
