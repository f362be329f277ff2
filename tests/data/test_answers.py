"""Answers compare as people would compare them."""

from __future__ import annotations

from typing import Any

import pytest

from sqft.data.answers import extract_answer, without_reasoning


@pytest.mark.parametrize(
    ("text", "mode", "answer"),
    [
        (" 46\n", "text", "46"),
        ("It is 1,234.50 or 7", "first_number", "1234.5"),
        ("It is 1,234.50 or 7.0", "last_number", "7"),
        ("-0", "first_number", "0"),
        ("-0.0", "first_number", "0"),
        ("12.", "first_number", "12"),
        ("007.10", "first_number", "7.1"),
        ("-12,345,678", "first_number", "-12345678"),
        ("-$5", "first_number", "-5"),
        ("−5", "first_number", "-5"),
        (".5", "first_number", "0.5"),
        ("wait...5", "first_number", "5"),
        ("1,2,3", "first_number", "1"),
        ("1,2,3", "last_number", "3"),
        ("1,2345", "last_number", "2345"),
        ("x2", "first_number", "2"),
        ("GPT-4", "first_number", "4"),
        ("10-5", "last_number", "5"),
        ("10 - -5", "last_number", "-5"),
        ("2024-05-12", "last_number", "12"),
        ("f(3)-4", "last_number", "4"),
        ("none", "first_number", ""),
        ("100", "first_number", "100"),
        ("<think>\n2 and 2\n</think>\n\n4", "first_number", "4"),
        ("\n</think>\n\nIt is 4.", "text", "It is 4."),
    ],
)
def test_answers(text: str, mode: Any, answer: str) -> None:
    assert extract_answer(text, mode) == answer


FINAL = "<|channel|>final<|message|>"


@pytest.mark.parametrize(
    ("text", "marker", "reasons", "said"),
    [
        ("4", "", False, "4"),
        ("4", "</think>", False, "4"),  # it did not reason
        ("2 and 2 is 4", "</think>", True, ""),  # cut off inside its reasoning
        ("2 and 2</think>4", "</think>", True, "4"),
        ("<think>2 and 2", "", False, ""),
        ("<think>2 and 2</think>4", "", False, "4"),
        ("<|channel|>analysis<|message|>2<|end|>", FINAL, False, ""),
        (f"<|channel|>analysis<|message|>2<|end|>{FINAL}4", FINAL, False, "4"),
    ],
)
def test_reasoning_is_no_answer(text: str, marker: str, reasons: bool, said: str) -> None:
    assert without_reasoning(text, marker, reasons) == said
