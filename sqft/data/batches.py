"""Tokens become tensors: padded batches, calibration windows, windows of held-out text."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.data.formats import SUFFIXES, suffix_of, text_of
from sqft.data.prompts import IGNORED, Example, encode
from sqft.data.records import named, read_records
from sqft.errors import DataError


class Collator:
    """Examples as right-padded tensors [batch, tokens].

    No row has a label in its first place: nothing predicts it, and Trainer counts every label it sees.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)

        def padded(rows: list[Any], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])

        return {
            "input_ids": padded([e["input_ids"] for e in examples], self.pad_id),
            "attention_mask": padded([[1] * len(e["input_ids"]) for e in examples], 0),
            "labels": padded([[IGNORED, *e["labels"][1:]] for e in examples], IGNORED),
        }


class PackingCollator:
    """Rows of several examples as tensors [batch, tokens]: each example's positions begin at 0, which is how
    transformers' masks tell them apart. What fills a row up is one more that carries no loss."""

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        longest = max(sum(len(example.input_ids) for example in row["examples"]) for row in rows)
        ids, labels, positions = [], [], []
        for row in rows:
            examples: Sequence[Example] = row["examples"]
            rest = longest - sum(len(example.input_ids) for example in examples)
            ids.append([token for e in examples for token in e.input_ids] + [self.pad_id] * rest)
            labels.append([label for e in examples for label in (IGNORED, *e.labels[1:])] + [IGNORED] * rest)
            positions.append([place for e in examples for place in range(len(e.input_ids))] + list(range(rest)))
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "position_ids": torch.tensor(positions)}


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Examples in rows of at most `length` tokens, the longest first, each in the row that it fills best."""
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # what is left of each row and which it is, in order
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        size = len(example.input_ids)
        place = bisect_left(room, (size, 0))
        left, row = room.pop(place) if place < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        insort(room, (left - size, row))
    return rows


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
