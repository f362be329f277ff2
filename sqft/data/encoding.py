"""Records become token sequences with labels: {prompt, completion}, {messages} or {text}."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from sqft.data.records import named
from sqft.errors import DataError, StageError

IGNORED = -100
"""The label of a token that carries no loss."""


NUMBER = re.compile(
    r"(?:(?<![\w)])([-−])[$€£]?)?"  # a minus, which the hyphen of "10-5", "2024-05" or "GPT-4" is not
    r"(\d{1,3}(?:,\d{3})+(?!\d)|\d+|(?<![\w.])(?=\.\d))"  # commas only between thousands: "1,2" is two numbers
    r"(?:\.(\d+))?"
)


Answer = Literal["text", "first_number", "last_number"]


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


def encode_all(records: Sequence[dict[str, Any]], tokenizer: Any, max_length: int, loss_on: str) -> Encoded:
    """Encode every record.

    Raises:
        DataError: naming a record that leaves no token to learn from or that the chat template refuses.
    """
    examples, truncated, cut_in_all = [], 0, 0
    for number, record in enumerate(records, 1):
        with named(record, number):
            pieces, cut = encode(record, tokenizer, max_length, loss_on)
            if not any(label != IGNORED for piece in pieces for label in piece.labels[1:]):
                raise DataError("there is no token to learn from (an empty completion?)")
        examples += pieces
        truncated += cut > 0
        cut_in_all += cut
    return Encoded(examples, truncated, cut_in_all)


def encode(record: dict[str, Any], tokenizer: Any, max_length: int, loss_on: str) -> tuple[list[Example], int]:
    """One record as examples, and how many tokens were cut.

    A {text} is as many examples as it takes, and only the last one ends in an end of sequence; nothing
    is cut. The others are one example each. Prompt and completion are tokenized apart, so that
    evaluation's prompt is training's prefix. A long example is cut at the left. Where only completions
    carry loss, a last completion that is longer than `max_length` keeps its beginning, and the token
    that predicts it.

    Raises:
        DataError: when the chat template refuses the conversation or hides where a turn begins.
    """
    if "messages" in record:
        ids = _template(record["messages"], tokenizer, False)
        labels = ids if loss_on == "all" else _turns(record["messages"], ids, tokenizer)
    elif "prompt" in record:
        prompt = _prompt(record["prompt"], tokenizer)
        completion = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
        # An empty completion teaches nothing: no end of sequence stands in for it.
        completion = _ended(completion, tokenizer) if completion else []
        ids = prompt + completion
        labels = ids if loss_on == "all" else [IGNORED] * len(prompt) + completion
    else:
        ids = _ended(_open(record["text"], tokenizer), tokenizer)
        pieces = [tuple(ids[start : start + max_length]) for start in range(0, len(ids), max_length)]
        if len(pieces) > 1 and len(pieces[-1]) == 1:  # nothing before it to learn it from
            pieces.pop()
        return [Example(piece, piece) for piece in pieces], 0
    cut = max(0, len(ids) - max_length)
    if cut:
        begins = [i for i in range(1, len(ids)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
        start = min(cut, begins[-1] - 1) if begins else cut
        ids, labels = ids[start : start + max_length], labels[start : start + max_length]
    return [Example(tuple(ids), tuple(labels))], cut


def prompts_of(records: Sequence[dict[str, Any]], tokenizer: Any) -> list[tuple[list[int], str]]:
    """`prompt_ids` of every record.

    Raises:
        DataError: naming a record that has no prompt or no completion.
    """
    prompts = []
    for number, record in enumerate(records, 1):
        with named(record, number):
            prompts.append(prompt_ids(record, tokenizer))
    return prompts


def cut_to(
    window: int, new_tokens: int, prompts: Sequence[tuple[list[int], str]]
) -> tuple[list[tuple[list[int], str]], int]:
    """Prompts that leave room for `new_tokens`, longer ones cut at the left as in training, and how many those are.

    Raises:
        StageError: when no prompt would.
    """
    if (room := window - new_tokens) < 1:
        raise StageError(f"max_new_tokens of {new_tokens} leave no room for a prompt in a window of {window}")
    cut = sum(len(ids) > room for ids, _ in prompts)
    return [(ids[-room:], completion) for ids, completion in prompts], cut


def prompt_ids(record: dict[str, Any], tokenizer: Any) -> tuple[list[int], str]:
    """What generation starts from, at least one token, and the completion it is compared with.

    Raises:
        DataError: for a {text} record, which has no completion, or a conversation that has no prompt.
    """
    if "messages" in record:
        messages = record["messages"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return _template(messages[:last], tokenizer, True), messages[last]["content"]
    if "prompt" not in record:
        raise DataError("a {text} record has no completion to compare with; use {prompt, completion} or {messages}")
    return _prompt(record["prompt"], tokenizer), record["completion"].removesuffix(tokenizer.eos_token or "")


def completion_of(record: dict[str, Any]) -> str:
    """What a generation is compared with: the completion, or the last assistant turn; "" of a {text} record."""
    turns = [message["content"] for message in record.get("messages", ()) if message["role"] == "assistant"]
    return turns[-1] if turns else str(record.get("completion", ""))


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


def _open(text: str, tokenizer: Any) -> list[int]:
    """A text with the tokenizer's own special tokens, save an end of sequence that it appends itself."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    return ids[:-1] if ids and added[-1] and ids[-1] == tokenizer.eos_token_id else ids


def _prompt(text: str, tokenizer: Any) -> list[int]:
    """A prompt's tokens; with none, generation starts from the token that begins a sequence."""
    if ids := _open(text, tokenizer):
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise DataError("the prompt is empty, and the tokenizer has no token to start from; give a prompt")
    return [start]


def _ended(ids: list[int], tokenizer: Any) -> list[int]:
    """Tokens with an end of sequence: the user's own, or else one more."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _template(messages: Sequence[dict[str, str]], tokenizer: Any, generation: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; use {prompt, completion} records")
    if not messages:
        raise DataError("the assistant speaks first, so there is no prompt; put a user's turn before it")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=generation, return_dict=False
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses the conversation: {error}") from None
    return ids


def _turns(messages: Sequence[dict[str, str]], ids: list[int], tokenizer: Any) -> list[int]:
    """Labels of a conversation's tokens; the assistant's turns are found as what each adds to the one before."""
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
    return labels
