"""What a generated text is compared with, and how: as text, or by its first or last number."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any, Literal

NUMBER = re.compile(
    r"(?:(?<![\w)])([-−])[$€£]?)?"  # a minus, which the hyphen of "10-5", "2024-05" or "GPT-4" is not
    r"(\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<![\w.])(?=\.\d))"  # commas only between thousands: "1,2" is two numbers
    r"(?:\.(\d+))?"
)

Answer = Literal["text", "first_number", "last_number"]
"""Which part of a completion is its answer."""


def extract_answer(text: str, mode: Answer) -> str:
    """Return the part of a text that is compared: all of it, stripped, or its first or last number.

    What comes before the end of a block of reasoning (</think>) is no part of the answer. Numbers that are equal are
    spelt alike: "1,234.50" becomes "1234.5". "" when the text has no number.
    """
    text = text.rpartition("</think>")[2]
    if mode == "text":
        return text.strip()
    numbers = NUMBER.findall(text)
    if not numbers:
        return ""
    minus, integer, fraction = numbers[0 if mode == "first_number" else -1]
    number = integer.replace(",", "").lstrip("0") or "0"
    if fraction := fraction.rstrip("0"):
        number = f"{number}.{fraction}"
    return f"-{number}" if minus and number != "0" else number


def is_right(found: str, expected: str, tolerance: float) -> bool:
    """Return whether an answer is the expected one; a `tolerance` that is not 0 compares numbers."""
    if not (found and expected):
        return False
    return abs(Decimal(found) - Decimal(expected)) <= Decimal(str(tolerance)) if tolerance else found == expected


def without_reasoning(text: str, marker: str, reasons: bool) -> str:
    """Return what a generated text says after its reasoning; "" when it has not come to an end of that.

    Args:
        text: with its special tokens.
        marker: the tags that the chat template writes before an answer ("</think>"); "" for none.
        reasons: whether generation began inside a block of reasoning.
    """
    if marker and marker in text:
        return text.rpartition(marker)[2]
    unfinished = reasons or text.lstrip().startswith(("<think>", *[marker[: marker.find(">") + 1]] * bool(marker)))
    return "" if unfinished and "</think>" not in text else text.rpartition("</think>")[2]


def completion_of(record: dict[str, Any]) -> str:
    """Return a record's completion, or the last assistant turn of its conversation; "" for a {text} record."""
    turns = [message.get("content", "") for message in record.get("messages", ()) if message["role"] == "assistant"]
    return turns[-1] if turns else str(record.get("completion", ""))
