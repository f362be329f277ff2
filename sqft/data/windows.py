"""Text becomes windows of tokens: for calibration, and for perplexity."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.data.encoding import Tokenization
from sqft.data.readers import is_plain_text, read_text
from sqft.data.records import ReadOptions, Record, locate_errors, read_records, records_of
from sqft.errors import DataError


def calibration_windows(
    path: Path,
    tokenizer: Any,
    samples: int,
    length: int,
    seed: int,
    options: ReadOptions | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Tensor:
    """Draw windows of a file's tokens that do not overlap.

    Args:
        path: A file of records (.jsonl, .json, .csv, .parquet, .arrow) or a folder that is a data set, whose documents
            are joined, each followed by an end-of-sequence token; any other file is plain text.
        tokenizer: The model's.
        samples: The number of windows.
        length: Tokens in a window.
        seed: Decides which windows are drawn; the global generator is not used.
        options: How to read records.
        chat_template_kwargs: The model's arguments for the chat template, if the records are conversations.

    Returns:
        Token ids, int64 [samples, length].

    Raises:
        DataError: when the file is too short, saying how many windows it holds.
    """
    if is_plain_text(path):
        stream = torch.tensor(_text(path, tokenizer))
    else:
        records = records_of(path, options, chat_template_kwargs) if options else read_records(path)
        stream = torch.tensor(_joined(records, tokenizer))
    available = len(stream) // length
    if available < samples:
        raise DataError(
            f"{path} has {len(stream)} tokens, and {samples} windows of {length} need {samples * length}; "
            + (f"set calibration.samples to at most {available}, " if available else "")
            + "shorten calibration.length, or give more text"
        )
    picks = torch.randperm(available, generator=torch.Generator().manual_seed(seed))[:samples]
    return stream[: available * length].reshape(available, length)[picks]  # [samples, length]


def text_windows(path: Path, tokenizer: Any, tokens: int | None, length: int) -> list[Tensor]:
    """Split the first `tokens` tokens of a text into windows [at most `length`] that do not overlap.

    A last window of fewer than 2 tokens is dropped.

    Raises:
        DataError: when there are fewer than 2 tokens.
    """
    records = not is_plain_text(path)
    stream = torch.tensor((_joined(read_records(path), tokenizer) if records else _text(path, tokenizer))[:tokens])
    windows = [window for window in torch.split(stream, length) if len(window) >= 2]
    if not windows:
        raise DataError(f"{path} has fewer than 2 tokens, so its perplexity cannot be computed; give more text")
    return windows


def _text(path: Path, tokenizer: Any) -> list[int]:
    return list(tokenizer(read_text(path), verbose=False)["input_ids"])


def _joined(records: Iterable[Record], tokenizer: Any) -> list[int]:
    tokenization = Tokenization(tokenizer, sys.maxsize, "all")
    stream: list[int] = []
    for number, record in enumerate(records, 1):
        with locate_errors(record, number):
            for piece in tokenization.encode_record(record):
                stream += piece.input_ids
    return stream
