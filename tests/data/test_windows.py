"""Token streams, and the windows drawn from them."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sqft.data.windows import calibration_windows, text_windows
from sqft.errors import DataError

RECORDS = [
    {"text": "one text"},
    {"prompt": "a question, ", "completion": "an answer"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
]


STREAM = (
    "one text<|im_end|>a question, an answer<|im_end|>"
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>"
)


def as_jsonl(path: Path, records: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


def test_documents_follow_in_file_order_with_an_end_between(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    windows = text_windows(as_jsonl(tmp_path / "d.jsonl", RECORDS), tokenizer, None, 16)
    assert tokenizer.decode(torch.cat(windows)) == STREAM
    assert [len(window) for window in windows[:-1]] == [16] * (len(windows) - 1)


@pytest.mark.parametrize("seed", range(4))
def test_calibration_windows_are_disjoint_parts_of_the_stream(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, seed: int
) -> None:
    text = "".join(chr(33 + i % 90) for i in range(85))  # one token a character
    (tmp_path / "d.txt").write_text(text)
    windows = calibration_windows(tmp_path / "d.txt", tokenizer, 6, 10, seed)
    assert windows.shape == (6, 10) and windows.dtype == torch.long
    starts = [text.index(tokenizer.decode(window)) for window in windows]
    assert len(set(starts)) == 6 and all(start % 10 == 0 for start in starts)


def test_the_seed_draws_the_windows_and_the_global_generator_is_left_alone(
    tokenizer: PreTrainedTokenizerFast, data: Path
) -> None:
    before = torch.random.get_rng_state()
    first = calibration_windows(data / "calibration.jsonl", tokenizer, 8, 16, 3)
    torch.manual_seed(99)
    assert torch.equal(first, calibration_windows(data / "calibration.jsonl", tokenizer, 8, 16, 3))
    torch.random.set_rng_state(before)
    calibration_windows(data / "calibration.jsonl", tokenizer, 8, 16, 4)
    assert torch.equal(before, torch.random.get_rng_state())


def test_exactly_enough_is_enough(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("x" * 64)
    assert calibration_windows(tmp_path / "d.txt", tokenizer, 4, 16, 0).shape == (4, 16)
    with pytest.raises(DataError, match=r"has 64 tokens, and 5 windows of 16 need 80; .* at most 4"):
        calibration_windows(tmp_path / "d.txt", tokenizer, 5, 16, 0)


def test_unreadable_and_too_short_texts_are_named(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt cannot be read"):
        text_windows(tmp_path / "gone.txt", tokenizer, None, 8)
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    with pytest.raises(DataError, match=r"latin\.txt cannot be read as UTF-8"):
        text_windows(tmp_path / "latin.txt", tokenizer, None, 8)
    (tmp_path / "short.txt").write_text("x")
    with pytest.raises(DataError, match="fewer than 2 tokens"):
        text_windows(tmp_path / "short.txt", tokenizer, None, 8)


def test_a_byte_order_mark_is_no_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_bytes("\ufeffone text".encode())
    assert tokenizer.decode(torch.cat(text_windows(tmp_path / "d.txt", tokenizer, None, 8))) == "one text"


def test_compressed_records_and_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert tokenizer.decode(torch.cat(text_windows(tmp_path / "d.jsonl.gz", tokenizer, None, 16))) == STREAM
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"two\n\nlines"))
    assert tokenizer.decode(torch.cat(text_windows(tmp_path / "d.txt.gz", tokenizer, None, 16))) == "two\n\nlines"


@pytest.mark.parametrize("left", [0, 1, 2])
def test_windows_of_text_tile_its_first_tokens(tokenizer: PreTrainedTokenizerFast, data: Path, left: int) -> None:
    windows = text_windows(data / "heldout.txt", tokenizer, 64 + left, 32)
    assert [len(window) for window in windows] == [32, 32, *([2] if left == 2 else [])]
    start = tokenizer((data / "heldout.txt").read_text())["input_ids"][: 64 + left // 2 * 2]
    assert torch.cat(windows).tolist() == start
