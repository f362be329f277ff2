"""Token sequences become padded or packed batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sqft.data.encoding import IGNORED, Example


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
