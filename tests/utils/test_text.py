"""Values as people read them."""

from __future__ import annotations

import pytest

from sqft.utils.text import brief, html_table, human_size, markdown_table, signed_percent


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (-2048, "-2 KiB"), (5 << 20, "5 MiB"), (1 << 30, "1.00 GiB"),
        (5 << 40, "5120.00 GiB"),
    ],
)  # fmt: skip
def test_sizes(size: int, text: str) -> None:
    assert human_size(size) == text


def test_long_values_are_shortened() -> None:
    assert brief({"a": [1, "é"]}) == '{"a": [1, "\\u00e9"]}'
    assert len(brief("x" * 100)) == 60 and brief("x" * 100).endswith("...")
    assert brief(range(2)) == '"range(0, 2)"'


def test_a_table_escapes_what_markdown_would_read() -> None:
    table = markdown_table("Title", ["a", "b"], [["x|y", "*b*\nc"], ["<i>", "[l]`\\"]])
    assert table == "# Title\n\n| a | b |\n|---|---|\n| x\\|y | \\*b\\* c |\n| \\<i> | \\[l]\\`\\\\ |\n"


def test_a_table_in_html_escapes_what_a_browser_would_read() -> None:
    table = html_table("A & B", ["a"], [["<i>"]])
    assert table == "<table><caption>A &amp; B</caption><tr><th>a</th></tr><tr><td>&lt;i&gt;</td></tr></table>"


def test_shares_with_their_sign() -> None:
    assert [signed_percent(share) for share in (0.015, -0.2, 0.0)] == ["+1.5", "−20.0", "+0.0"]
