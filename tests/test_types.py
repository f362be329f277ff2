"""Values that pass between the core and components."""

from __future__ import annotations

import pytest

from sqft.types import Pattern


@pytest.mark.parametrize(
    ("text", "kept", "of", "sparsity"),
    [("row", 0, 0, None), ("layer", 0, 0, None), ("2:4", 2, 4, 0.5), ("1:4", 1, 4, 0.75), ("4:4", 4, 4, 0.0)],
)
def test_a_pattern_is_read_once_and_gives_its_word_back(text: str, kept: int, of: int, sparsity: float | None) -> None:
    pattern = Pattern.parse(text)
    assert (pattern.kept, pattern.of, pattern.sparsity, str(pattern)) == (kept, of, sparsity, text)
    assert pattern == Pattern.parse(text)


@pytest.mark.parametrize("text", ["5:4", "0:4", "0:0", "2:0", "-1:3", "2:3:3", "2:", "rows", ""])
def test_no_pattern(text: str) -> None:
    with pytest.raises(ValueError, match=f"pattern '{text}' must be 'row', 'layer' or 'N:M'"):
        Pattern.parse(text)
