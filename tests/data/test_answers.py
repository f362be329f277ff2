"""Answers compare as people would compare them."""

from __future__ import annotations

from typing import Any

import pytest

from sqft.data.answers import extract_answer, is_right, without_reasoning


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


OUTPUTS = [
    ("She sells 16 - 7 = 9 eggs for $2 each, so she makes 9 * 2 = $18. The answer is 18.", "18.0", True),
    ("The answer is 18.", "17.0", False),
    ("He pays 3 * $400 = $1,200, and 2 * $1,150 = $2,300. In all, $3,500.00.", "3500.0", True),
    ("There are 1,250,000 grains.", "1250000.0", True),
    ("The green one is 3 - 1.1667 = 1.8333 inches longer.", "1.8333333333333335", True),
    ("The green one is 3 - 1.17 = 1.83 inches longer.", "1.8333333333333335", False),
    ("2 / 3 of it is about 0.667", "0.6666666666666666", True),
    ("2 / 3 of it is about 0.66", "0.6666666666666666", False),
    ("x * x - 36 = 189, so the number is -15.", "-15.0", True),
    ("x * x - 36 = 189, so the number is 15.", "-15.0", False),
    ("The temperature is now 4 - 9 = -5 degrees.\n\n", "-5", True),
    ("It holds .5 of a gallon", "0.5", True),
    ("Half of 7 is 3.5.", "3.5", True),
    ("The final answer is 007", "7", True),
    ("That is 25%.", "25.0", True),
    ("#### 72", "72.0", True),
    ("Tom has 5 apples and Ann has twice as many.\nA: 10\n\n### Instruction:\nA farm has 3 cows", "10.0", False),
    ("43.0005", "43", True),
    ("43.001", "43", True),
    ("43.0011", "43", False),
    ("I cannot tell.", "12.0", False),
    ("", "12.0", False),
    ("He is owed -$7.", "-7.0", True),
    ("It takes 10-5 minutes.", "5.0", True),
    ("They have 1, 2 and 3,4.", "4.0", True),
]
"""What models say to word problems, the expected number, and whether it is right to a thousandth."""

OTHERWISE = {"It holds .5 of a gallon", "He is owed -$7.", "It takes 10-5 minutes.", "They have 1, 2 and 3,4."}
"""Where the protocol's simpler rule reads 5, 7, -5 and 34."""


def by_the_protocol(text: str, expected: str) -> bool:
    """LLM-Adapters' rule, letter by letter: without commas, the last run of digits, with what stands around it."""
    text, numbers, at = text.replace(",", ""), [float("inf")], 0
    while at < len(text):
        end = at + (text[at] == "-")
        start = end
        while end < len(text) and (text[end].isdecimal() or (text[end] == "." and text[start:end].isdecimal())):
            end += 1
        if end > start:
            numbers.append(float(text[at:end]))
        at = max(end, at + 1)
    return abs(float(expected) - numbers[-1]) <= 0.001


@pytest.mark.parametrize(("text", "expected", "right"), OUTPUTS)
def test_word_problems_are_right_to_a_tolerance(text: str, expected: str, right: bool) -> None:
    found, wanted = (extract_answer(part, "last_number") for part in (text, expected))
    assert is_right(found, wanted, 0.001) is right
    assert by_the_protocol(text, expected) is (right if text not in OTHERWISE else not right)
    assert is_right(found, wanted, 0.0) is (found == wanted != "")


def test_texts_are_compared_as_they_are() -> None:
    assert is_right("yes", "yes", 0.0) and not is_right("yes", "no", 0.0) and not is_right("", "", 0.0)


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
