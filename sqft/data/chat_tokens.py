"""The turns of conversations as tokens: through the tokenizer's own chat template, and its marks of what is learnt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqft.data.chat_template import is_marked, rejection, variables_of
from sqft.data.chats import NO_TEMPLATE, Chat, Messages, Turn
from sqft.errors import DataError

Spans = Sequence[tuple[int, int]]
"""Beginnings and ends of parts of a text."""


def chat_of(tokenizer: Any) -> Chat:
    """Return a tokenizer's chat template."""

    def render(messages: Messages, generation: bool, tools: Any, arguments: Mapping[str, Any]) -> str:
        if not source:
            raise DataError(NO_TEMPLATE)
        try:
            return str(
                tokenizer.apply_chat_template(
                    list(messages), tools=tools, tokenize=False, add_generation_prompt=generation, **arguments
                )
            )
        except Exception as error:  # a template's expressions can raise anything
            raise rejection(error) from None

    source = tokenizer.chat_template
    sources = source.values() if isinstance(source, dict) else [source or ""]
    variables = sorted({name for text in sources for name in variables_of(text) or ()})
    return Chat(render, special_tokens(tokenizer), tokenizer.eos_token, tokenizer.bos_token, variables)


def special_tokens(tokenizer: Any) -> list[str]:
    """Return all special tokens of a tokenizer, those that have no name included."""
    added = [str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special]
    return [*added, *tokenizer.all_special_tokens]


def turn_tokens(tokenizer: Any, record: Mapping[str, Any], turn: Turn) -> tuple[list[int], list[int], list[bool]]:
    """Return the tokens of a turn's prompt and answer, and for each of the answer whether it is learnt.

    They are the tokens of the text as a whole, or, where no token ends with the prompt, of its two parts. All of the
    answer is learnt, unless the template marks the assistant's words: then those, to the end of the turn.
    """
    prompt, both = tokens_of(tokenizer, turn.prompt), tokens_of(tokenizer, turn.text)
    split = both[: len(prompt)] != prompt
    answer = tokens_of(tokenizer, turn.answer) if split else both[len(prompt) :]
    spans = _marked_spans(tokenizer, record, turn)
    if spans is None:
        return prompt, answer, [True] * len(answer)
    text, before = (turn.answer, 0) if split else (turn.text, len(turn.prompt))
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"][-len(answer) :]
    # Of the answer, what the template wrote comes after what closes a block of reasoning.
    shift = turn.start - before - turn.closes
    learnt = [
        begin < before + turn.closes or any(begin + shift < stop and start < end + shift for start, stop in spans)
        for begin, end in offsets
    ]
    if turn.end and any(learnt):  # the end is learnt too where the mark leaves it out
        last = max(index for index, learns in enumerate(learnt) if learns)
        learnt[last:] = [True] * (len(learnt) - last)
    return prompt, answer, learnt


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text that a chat template wrote: it has its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _marked_spans(tokenizer: Any, record: Mapping[str, Any], turn: Turn) -> Spans | None:
    """Return where the template marks the assistant's words in `turn.finished`; None when it marks none."""
    tools, arguments = record.get("tools"), record.get("chat_template_kwargs") or {}
    source = tokenizer.get_chat_template(tools=tools)
    if not (is_marked(source) and tokenizer.is_fast):  # without offsets, all of the answer is learnt
        return None
    from transformers.utils.chat_template_utils import render_jinja_template

    _, spans = render_jinja_template(
        conversations=[turn.messages],
        tools=tools,
        chat_template=source,
        return_assistant_tokens_mask=True,
        **{**tokenizer.special_tokens_map, **arguments},
    )
    return list(spans[0])
