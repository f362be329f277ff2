"""Records become token sequences with labels: {prompt, completion}, {messages} or {text}."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sqft.errors import DataError

IGNORED = -100
"""The label of a token that carries no loss."""
SHAPES = "'prompt' and 'completion', or 'messages', or 'text'"
NUMBER = re.compile(
    r"(?:(?<![\w)])([-−])[$€£]?)?"  # a minus, which the hyphen of "10-5", "2024-05" or "GPT-4" is not
    r"(\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<![\w.])(?=\.\d))"  # commas only between thousands: "1,2" is two numbers
    r"(?:\.(\d+))?"
)
SURROGATE = re.compile("[\ud800-\udfff]")
Answer = Literal["text", "first_number", "last_number"]


class Record(dict[str, Any]):
    """A record of a file; `place` is the file and the line it came from."""

    place: str


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and, for each, its label: itself, or −100 where there is no loss."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set as tokens, and what was cut to fit."""

    examples: list[Example]
    truncated: int
    tokens_cut: int


def read_records(path: Path, limit: int | None = None) -> list[dict[str, Any]]:
    """The records of a JSON Lines file, each a `Record`; lines after the first `limit` records are not read.

    Raises:
        DataError: naming the file and the first bad lines, or saying that there is no record.
    """
    records: list[dict[str, Any]] = []
    wrong: list[str] = []
    try:
        with path.open("rb") as stream:  # bytes: their lines end at "\n" alone, and JSON may hold U+2028 or U+0085
            for number, line in enumerate(stream, 1):
                if len(records) == limit:
                    break
                try:
                    records += _records_of(line, f"{path}:{number}")
                except DataError as error:
                    wrong.append(str(error))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
    if wrong:
        more = f"\n… and {len(wrong) - 5} more lines" if len(wrong) > 5 else ""
        raise DataError("\n".join(wrong[:5]) + more)
    if not records:
        raise DataError(f"{path} holds no record; expected one JSON object a line with {SHAPES}")
    return records


def _records_of(line: bytes, place: str) -> list[Record]:
    """One record, or none of a blank line."""
    try:
        text = line.decode("utf-8-sig")
        content: Any = json.loads(text) if text.strip() else None
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text: {error}") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not valid JSON: {error}") from None
    if not text.strip():
        return []
    if mistake := _mistake(content):
        raise DataError(f"{place}: {mistake}")
    record = Record(content)
    record.place = place
    return [record]


def _mistake(record: Any) -> str | None:
    if not isinstance(record, dict):
        return f"expected a JSON object with {SHAPES}, found {type(record).__name__}"
    if "messages" in record:
        messages = record["messages"]
        whole = isinstance(messages, list) and all(
            isinstance(m, dict) and _is_text(m.get("role")) and _is_text(m.get("content")) for m in messages
        )
        if not whole or not any(m["role"] == "assistant" for m in messages):
            return "'messages' must be a list of {role, content} with at least one assistant turn"
        return None
    keys = ("prompt", "completion") if "prompt" in record or "completion" in record else ("text",)
    for key in keys:
        if not _is_text(record.get(key)):
            return f"expected {SHAPES}; '{key}' is {'not text' if key in record else 'missing'}"
    return None


def _is_text(value: Any) -> bool:
    """A string that can be tokenized: JSON can also spell half of a surrogate pair."""
    return isinstance(value, str) and not SURROGATE.search(value)


def encode_all(records: Sequence[dict[str, Any]], tokenizer: Any, max_length: int, loss_on: str) -> Encoded:
    """Encode every record.

    Raises:
        DataError: when a record leaves no token to learn from.
    """
    examples, truncated, cut_in_all = [], 0, 0
    for number, record in enumerate(records, 1):
        example, cut = encode(record, tokenizer, max_length, loss_on)
        if all(label == IGNORED for label in example.labels[1:]):
            raise DataError(f"record {number} has no token to learn from (an empty completion?)")
        examples.append(example)
        truncated += cut > 0
        cut_in_all += cut
    return Encoded(examples, truncated, cut_in_all)


def encode(record: dict[str, Any], tokenizer: Any, max_length: int, loss_on: str) -> tuple[Example, int]:
    """One record as an example, and how many tokens were cut.

    Prompt and completion are tokenized apart, so that evaluation's prompt is training's prefix. A
    long example is cut at the left; a completion longer than `max_length` at its right.
    """
    if "messages" in record:
        ids, labels = _chat(record["messages"], tokenizer)
    elif "text" in record:
        ids = [*tokenizer(record["text"])["input_ids"], tokenizer.eos_token_id]
        labels = list(ids)
    else:
        prompt = _prompt(record["prompt"], tokenizer)
        completion = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
        # An empty completion teaches nothing: no end of sequence stands in for it.
        completion = [*completion, tokenizer.eos_token_id] if completion else []
        ids = prompt + completion
        labels = [IGNORED] * len(prompt) + completion
    if loss_on == "all":
        labels = list(ids)
    cut = max(0, len(ids) - max_length)
    if cut:
        first = next((i for i, label in enumerate(labels) if label != IGNORED), 0)
        start = min(cut, max(first - 1, 0))
        ids, labels = ids[start : start + max_length], labels[start : start + max_length]
    return Example(tuple(ids), tuple(labels)), cut


def prompt_ids(record: dict[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """What generation starts from, and the completion it is compared with.

    Raises:
        DataError: for a {text} record, which has no completion.
    """
    if "messages" in record:
        messages = record["messages"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return _template(messages[:last], tokenizer, True), messages[last]["content"]
    if "prompt" not in record:
        raise DataError("a {text} record has no completion to compare with; use {prompt, completion} or {messages}")
    return _prompt(record["prompt"], tokenizer), record["completion"]


def answer_of(text: str, mode: Answer) -> str:
    """What is compared: the stripped text, or its first or last number in one spelling ("" when none)."""
    if mode == "text":
        return text.strip()
    found = NUMBER.findall(text)
    if not found:
        return ""
    minus, whole, fraction = found[0 if mode == "first_number" else -1]
    number = whole.replace(",", "").lstrip("0") or "0"
    if fraction := fraction.rstrip("0"):
        number = f"{number}.{fraction}"
    return f"-{number}" if minus and number != "0" else number


def _prompt(text: str, tokenizer: Any) -> list[int]:
    """A prompt with the tokenizer's own special tokens, but never an end of sequence."""
    ids = list(tokenizer(text)["input_ids"])
    return ids[:-1] if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id else ids


def _template(messages: Sequence[dict[str, str]], tokenizer: Any, generation: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; use {prompt, completion} records")
    return list(
        tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=generation, return_dict=False
        )
    )


def _chat(messages: Sequence[dict[str, str]], tokenizer: Any) -> tuple[list[int], list[int]]:
    """A conversation; the assistant's turns are found as what each adds to the one before."""
    ids = _template(messages, tokenizer, False)
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _template(messages[:index], tokenizer, True)
            after = _template(messages[: index + 1], tokenizer, False)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise DataError(
                    "the chat template rewrites earlier turns, so the assistant's turns cannot be told apart"
                )
            labels[len(before) : len(after)] = after[len(before) :]
    return ids, labels
