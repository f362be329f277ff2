"""Examples become padded or packed batches."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

from sqft.data.encoding import IGNORED, Example


class Collator:
    """Makes right-padded tensors [batch, tokens] of examples.

    The first label of every row is ignored: no token predicts it, and Trainer counts every label it sees.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        longest = max(len(example.input_ids) for example in examples)

        def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
            return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows])  # [batch, longest]

        return {
            "input_ids": padded([e.input_ids for e in examples], self.pad_id),
            "attention_mask": padded([[1] * len(e.input_ids) for e in examples], 0),
            "labels": padded([(IGNORED, *e.labels[1:]) for e in examples], IGNORED),
        }


class PackingCollator:
    """Makes tensors [batch, tokens] of rows that hold several examples each.

    The positions of each example begin at 0, which is how transformers' masks keep the examples of a row apart.
    Padding is one more example, without loss.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Sequence[Example]]) -> dict[str, Tensor]:
        longest = max(sum(len(example.input_ids) for example in row) for row in rows)
        ids, labels, positions = [], [], []
        for row in rows:
            padding = longest - sum(len(example.input_ids) for example in row)
            ids.append([token for e in row for token in e.input_ids] + [self.pad_id] * padding)
            labels.append([label for e in row for label in (IGNORED, *e.labels[1:])] + [IGNORED] * padding)
            positions.append([index for e in row for index in range(len(e.input_ids))] + list(range(padding)))
        return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "position_ids": torch.tensor(positions)}


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Pack examples into rows of at most `length` tokens: the longest first, each into the row that it fills best."""
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (tokens left, index of the row), sorted
    for example in sorted(examples, key=lambda e: -len(e.input_ids)):
        size = len(example.input_ids)
        fits = bisect_left(room, (size, 0))
        left, row = room.pop(fits) if fits < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(example)
        insort(room, (left - size, row))
    return rows
