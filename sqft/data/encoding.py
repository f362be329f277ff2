"""Records become token sequences with labels: {prompt, completion}, {messages} or {text}."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jinja2 import TemplateError

from sqft.data.records import locate_errors
from sqft.errors import DataError

IGNORED = -100
"""The label of a token that does not contribute to the loss."""

LossOn = Literal["completion", "all"]
"""Which tokens contribute to the loss; of a {text} record, always all."""

Prompt = tuple[list[int], str]
"""The tokens that generation starts from, and the completion that the generated text is compared with."""


@dataclass(frozen=True, slots=True)
class Example:
    """Token ids and their labels: a label is the token itself, or `IGNORED`."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A data set as examples; how many of them were truncated, and by how many tokens in all."""

    examples: list[Example]
    truncated: int
    tokens_cut: int


@dataclass(frozen=True, slots=True)
class Tokenization:
    """How records become examples: the tokenizer, the length of the longest example, and which tokens carry loss."""

    tokenizer: Any
    max_length: int
    loss_on: LossOn

    def encode(self, records: Sequence[dict[str, Any]]) -> Encoded:
        """Encode every record.

        Raises:
            DataError: naming a record that has no token to learn from, or that the chat template rejects.
        """
        examples, truncated, tokens_cut = [], 0, 0
        for number, record in enumerate(records, 1):
            with locate_errors(record, number):
                pieces, cut = self.encode_record(record)
                if not any(label != IGNORED for piece in pieces for label in piece.labels[1:]):
                    raise DataError("there is no token to learn from (is the completion empty?)")
            examples += pieces
            truncated += cut > 0
            tokens_cut += cut
        return Encoded(examples, truncated, tokens_cut)

    def encode_record(self, record: dict[str, Any]) -> tuple[list[Example], int]:
        """Encode one record; return its examples and the number of tokens that were cut.

        A {text} record is split into as many examples as it takes: only the last one ends in an end-of-sequence
        token, and nothing is cut. Any other record is one example. Its prompt and completion are tokenized
        separately, so that the prompt of evaluation is the prefix of the training example. A long example is cut
        at the left. Where only completions carry loss, a last completion that is longer than `max_length` keeps
        its beginning, and the token that predicts it.

        Raises:
            DataError: when the chat template rejects the conversation or hides where a turn begins.
        """
        tokenizer, max_length = self.tokenizer, self.max_length
        if "messages" in record:
            ids = _apply_chat_template(record["messages"], tokenizer, False)
            labels = ids if self.loss_on == "all" else _label_turns(record["messages"], ids, tokenizer)
        elif "prompt" in record:
            prompt = _tokenize_prompt(record["prompt"], tokenizer)
            completion = tokenizer(record["completion"], add_special_tokens=False)["input_ids"]
            # An empty completion stays empty: an end-of-sequence token alone would teach to answer nothing.
            completion = _with_end(completion, tokenizer) if completion else []
            ids = prompt + completion
            labels = ids if self.loss_on == "all" else [IGNORED] * len(prompt) + completion
        else:
            ids = _with_end(_tokenize_start(record["text"], tokenizer), tokenizer)
            pieces = [tuple(ids[start : start + max_length]) for start in range(0, len(ids), max_length)]
            if len(pieces) > 1 and len(pieces[-1]) == 1:  # no token before it predicts it
                pieces.pop()
            return [Example(piece, piece) for piece in pieces], 0
        cut = max(0, len(ids) - max_length)
        if cut:
            begins = [i for i in range(1, len(ids)) if labels[i] != IGNORED and labels[i - 1] == IGNORED]
            start = min(cut, begins[-1] - 1) if begins else cut
            ids, labels = ids[start : start + max_length], labels[start : start + max_length]
        return [Example(tuple(ids), tuple(labels))], cut


def encode_prompts(records: Sequence[dict[str, Any]], tokenizer: Any) -> list[Prompt]:
    """Encode the prompt of every record, as `encode_prompt` does.

    Raises:
        DataError: naming a record that has no prompt or no completion.
    """
    prompts = []
    for number, record in enumerate(records, 1):
        with locate_errors(record, number):
            prompts.append(encode_prompt(record, tokenizer))
    return prompts


def encode_prompt(record: dict[str, Any], tokenizer: Any) -> Prompt:
    """Return the tokens that generation starts from, at least one, and the completion to compare with.

    Raises:
        DataError: for a {text} record, which has no completion, or a conversation without a prompt.
    """
    if "messages" in record:
        messages = record["messages"]
        last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
        return _apply_chat_template(messages[:last], tokenizer, True), messages[last]["content"]
    if "prompt" not in record:
        raise DataError("a {text} record has no completion to compare with; use {prompt, completion} or {messages}")
    return _tokenize_prompt(record["prompt"], tokenizer), record["completion"].removesuffix(tokenizer.eos_token or "")


def truncate_prompts(prompts: Sequence[Prompt], window: int, max_new_tokens: int) -> tuple[list[Prompt], int]:
    """Cut prompts at the left, as in training, so that `max_new_tokens` more fit into a window of `window` tokens.

    Returns the prompts and how many of them were cut.

    Raises:
        DataError: when `max_new_tokens` leaves no room for any prompt.
    """
    if (room := window - max_new_tokens) < 1:
        raise DataError(
            f"max_new_tokens {max_new_tokens} leaves no room for a prompt: the model's window is {window} tokens; "
            "lower max_new_tokens"
        )
    cut = sum(len(ids) > room for ids, _ in prompts)
    return [(ids[-room:], completion) for ids, completion in prompts], cut


def _tokenize_start(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a text with the tokenizer's own special tokens, without an end-of-sequence token that it appends."""
    encoded = tokenizer(text, return_special_tokens_mask=True)
    ids, added = list(encoded["input_ids"]), encoded["special_tokens_mask"]
    return ids[:-1] if ids and added[-1] and ids[-1] == tokenizer.eos_token_id else ids


def _tokenize_prompt(text: str, tokenizer: Any) -> list[int]:
    """Tokenize a prompt; an empty one becomes the token that begins a sequence."""
    if ids := _tokenize_start(text, tokenizer):
        return ids
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise DataError("the prompt is empty, and the tokenizer has no token to start from; give a prompt")
    return [start]


def _with_end(ids: list[int], tokenizer: Any) -> list[int]:
    """Append the end-of-sequence token, unless the text itself ends in one or the tokenizer has none."""
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def _apply_chat_template(messages: Sequence[dict[str, str]], tokenizer: Any, generation: bool) -> list[int]:
    if not tokenizer.chat_template:
        raise DataError("the model's tokenizer has no chat template; use {prompt, completion} records")
    if not messages:
        raise DataError("the conversation begins with an assistant turn, so it has no prompt; add a user turn before")
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=generation, return_dict=False
        )
    except TemplateError as error:
        raise DataError(f"the chat template rejects the conversation: {error}") from None
    return ids


def _label_turns(messages: Sequence[dict[str, str]], ids: list[int], tokenizer: Any) -> list[int]:
    """Label the tokens of the assistant's turns: those that a turn adds to the conversation before it."""
    labels = [IGNORED] * len(ids)
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _apply_chat_template(messages[:index], tokenizer, True)
            after = _apply_chat_template(messages[: index + 1], tokenizer, False)
            if after[: len(before)] != before or ids[: len(after)] != after:
                raise DataError(
                    "the chat template rewrites earlier turns, so the tokens of the assistant's turns cannot be "
                    "identified; set finetune.loss_on to 'all'"
                )
            labels[len(before) : len(after)] = after[len(before) :]
    return labels
