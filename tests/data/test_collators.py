"""Examples become padded and packed batches."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft.data.collators import Collator, PackingCollator, pack
from sqft.data.encoding import Example


def test_batches_are_padded_right_and_no_row_starts_with_a_label() -> None:
    batch = Collator(9)([Example((1, 2, 3), (-100, 2, 3)), Example((4, 5), (4, 5))])
    assert {tensor.dtype for tensor in batch.values()} == {torch.long}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 3], [-100, 5, -100]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40))
def test_rows_hold_every_example_once(sizes: list[int]) -> None:
    examples = [Example(tuple(range(size)), tuple(range(size))) for size in sizes]
    rows = pack(examples, 20)
    assert sorted(len(e.input_ids) for row in rows for e in row) == sorted(sizes)
    assert all(sum(len(e.input_ids) for e in row) <= 20 for row in rows)
    # First fit: no two rows would go into one.
    used = sorted(sum(len(e.input_ids) for e in row) for row in rows)
    assert len(used) < 2 or used[0] + used[1] > 20


def test_packed_rows_as_tensors() -> None:
    one, two = Example((5, 6, 7), (-100, 6, 7)), Example((8, 9), (8, 9))
    batch = PackingCollator(0)([[one, two], [two]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [8, 9, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    # The first token of an example is predicted by none; filling carries no loss.
    assert batch["labels"].tolist() == [[-100, 6, 7, -100, 9], [-100, 9, -100, -100, -100]]
