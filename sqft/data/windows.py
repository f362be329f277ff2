"""Text becomes windows of tokens: for calibration, and for perplexity."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.data.encoding import encode
from sqft.data.readers import SUFFIXES, suffix_of, text_of
from sqft.data.records import named, read_records
from sqft.errors import DataError


def calibration_windows(path: Path, tokenizer: Any, samples: int, length: int, seed: int) -> Tensor:
    """`samples` windows [samples, length] that do not overlap, drawn from a file by `seed`.

    A .jsonl, .json, .csv, .parquet or .arrow file holds records, anything else is plain text. Documents follow one
    another with an end-of-sequence token between.

    Raises:
        DataError: when the file is too short, saying how many windows it holds.
    """
    stream = torch.tensor(_stream(path, tokenizer))
    there = len(stream) // length
    if there < samples:
        raise DataError(
            f"{path} has {len(stream)} tokens, and {samples} windows of {length} need {samples * length}; "
            + (f"set calibration.samples to at most {there}, " if there else "")
            + "shorten calibration.length, or give more text"
        )
    picks = torch.randperm(there, generator=torch.Generator().manual_seed(seed))[:samples]
    return stream[: there * length].reshape(there, length)[picks]


def text_windows(path: Path, tokenizer: Any, tokens: int | None, length: int) -> list[Tensor]:
    """A text as windows of at most `length` tokens that do not overlap; a last one of under 2 is dropped.

    Raises:
        DataError: when there are not 2 tokens.
    """
    stream = torch.tensor(_stream(path, tokenizer)[:tokens])
    windows = [window for window in torch.split(stream, length) if len(window) >= 2]
    if not windows:
        raise DataError(f"{path} has fewer than 2 tokens, so its perplexity cannot be taken")
    return windows


def _stream(path: Path, tokenizer: Any) -> list[int]:
    if suffix_of(path) in SUFFIXES and suffix_of(path) != ".txt":
        stream: list[int] = []
        for number, record in enumerate(read_records(path), 1):
            with named(record, number):
                for piece in encode(record, tokenizer, 1 << 30, "all")[0]:
                    stream += piece.input_ids
        return stream
    return list(tokenizer(text_of(path), verbose=False)["input_ids"])
