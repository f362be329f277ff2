"""What a chat template makes of a conversation: for each assistant turn, what inference starts from and must say.

All of it is text; `sqft.data.encoding` makes tokens of it. So the plan can ask the same questions without a tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from typing import Any

from sqft.data.tool_calls import CallForm, form_taken
from sqft.errors import DataError

Record = Mapping[str, Any]
Messages = Sequence[Mapping[str, Any]]

Render = Callable[[Messages, bool, Any, Mapping[str, Any]], str]
"""Renders messages, with the generation prompt or without, with tools (a list, or None) and the template's arguments.
"""

OPENED = re.compile(r"<(\w+)>\s*\Z")
"""A generation prompt's end that opens a block of reasoning: "<think>\\n"."""

BLOCK_TAGS = re.compile(r"</?think(ing)?>")
"""Tags around a block of reasoning: alone, they say nothing."""

MARKER = re.compile(r"(?:</?[^<>\s]+>\w*)+\Z")
"""The tags that a template writes right before an answer: "</think>", "<|channel|>final<|message|>"."""

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields of a message that may hold its reasoning."""

NO_TEMPLATE = "the model's tokenizer has no chat template; use {prompt, completion} records, or add chat_template.jinja"

UNWRITTEN = "the chat template writes nothing of it (tool calls or reasoning that it does not know)"
"""Why a turn is not learnt that says something."""

ANSWER, NEXT = "sqft-answer", "sqft-next"
"""Contents that are looked for again in a rendered probe."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One assistant turn as inference has it.

    Args:
        messages: those up to this turn, as the template is given them.
        prompt: the history and the generation prompt.
        answer: what generation must add, to the end of the turn.
        end: the special token that ends the answer; None when the template writes none.
        finished: the conversation up to this turn, without a generation prompt.
        start: where in `finished` the part of the answer begins that the template wrote.
        closes: the characters at the answer's start that close a block of reasoning, which the generation prompt opens
            and the template leaves out of finished turns.
    """

    messages: list[Mapping[str, Any]]
    prompt: str
    answer: str
    end: str | None
    finished: str
    start: int
    closes: int

    @property
    def text(self) -> str:
        return self.prompt + self.answer


class Chat:
    """A model's chat template, with what it takes to find the ends of turns.

    Args:
        render: makes text of messages.
        specials: the special tokens of the tokenizer.
        eos: the token that ends a sequence.
        bos: the token that begins one; it ends no turn.
        variables: the names that the template reads, to suggest arguments from.
    """

    def __init__(
        self,
        render: Render,
        specials: Sequence[str],
        eos: str | None = None,
        bos: str | None = None,
        variables: Sequence[str] = (),
    ) -> None:
        self.render, self.eos, self.variables = render, eos, variables
        ends = {token for token in specials if token and (token != bos or token == eos)}
        self._specials = sorted(ends, key=lambda token: (-len(token), token))
        self._closings: dict[tuple[str, str], str] = {}
        self._call_forms: dict[bool, CallForm] = {}

    def turns(self, record: Record) -> Iterator[Turn]:
        """Yield the turns of a record that are learnt, in their order.

        A turn of which the template writes nothing, such as tool calls that it does not know, is not learnt: it would
        teach to answer nothing.

        Raises:
            DataError: when no turn is learnt, or `turn` refuses one.
        """
        indices, shown = learnt(record), 0
        for index in indices:
            turn = self.turn(record, index)
            if self._says_something(turn):
                yield turn
                shown += 1
        if not shown:
            raise DataError(f"no turn of the assistant is to be learnt{f': {UNWRITTEN}' if indices else ''}")

    def _says_something(self, turn: Turn) -> bool:
        text = turn.answer
        for token in self._specials:
            text = text.replace(token, "")
        return bool(BLOCK_TAGS.sub("", text).strip())

    def prompt(self, record: Record, index: int) -> str:
        """Return what inference starts from to write a message.

        Raises:
            DataError: when there is nothing before it, or the template rejects the conversation.
        """
        if not index:
            raise DataError("the conversation begins with an assistant turn, so it has no prompt; add a user turn")
        return self._rendered(record, index, True)

    def turn(self, record: Record, index: int, arguments: Mapping[str, Any] | None = None) -> Turn:
        """Return one assistant turn of a record. `arguments` replace the record's own for the template.

        Where a finished turn does not begin with the generation prompt, inference still starts from that prompt. They
        may differ in whitespace, or by a block of reasoning that only the prompt has: then what is learnt closes it.

        Raises:
            DataError: when they differ in more, so that it is not known what comes after the prompt.
        """
        if arguments is not None:
            record = {**record, "chat_template_kwargs": arguments}
        message = record["messages"][index]
        prompt, finished = self.prompt(record, index), self._rendered(record, index + 1, False)
        closing, opened = "", OPENED.search(prompt)
        if finished.startswith(prompt):
            start = len(prompt)
        elif finished.startswith(prompt.rstrip()):
            start = len(prompt.rstrip())
        elif opened and finished.startswith(prompt[: opened.start()]):
            start, closing = opened.start(), f"{_reasoning(message, opened[1])}\n</{opened[1]}>\n\n"
        else:
            raise DataError(self._mismatch(record, index, prompt, finished, suggest=arguments is None))
        answer, end = self._ended(finished[start:], record, index)
        return Turn(self._given(record, index + 1), prompt, closing + answer, end, finished, start, len(closing))

    def marker(self, record: Record, index: int, turn: Turn) -> str:
        """Return the tags that the template writes in an answer right before what it says; "" for none.

        What a model generates before them is reasoning, which is no part of its answer.
        """
        said = str(record["messages"][index].get("content") or "").rpartition("</think>")[2].strip()
        answer = turn.answer.removesuffix(turn.end or "")  # which may hold a short answer: "<|return|>"
        before = answer[: answer.rfind(said)] if said and said in answer else ""
        found = MARKER.search(before.rstrip())
        return found[0] if found else ""

    def whole(self, record: Record) -> tuple[str, list[Turn]]:
        """Return a whole conversation, to the end of its last turn, and its turns that are switched off.

        Raises:
            DataError: when such a turn cannot be found in the whole.
        """
        messages = record["messages"]
        text = self._rendered(record, len(messages), False)
        if messages[-1]["role"] == "assistant":
            text, _ = self._ended(text, record, len(messages) - 1)
        skipped = [self.turn(record, index) for index in record.get("not_learnt", ())]
        if not all(text.startswith(turn.text) for turn in skipped):
            raise DataError(
                "the chat template rewrites earlier turns, so the tokens of a turn that is not to be learnt cannot be "
                "found; set finetune.loss_on to 'completion'"
            )
        return text, skipped

    def _rendered(self, record: Record, count: int, generation: bool) -> str:
        arguments = record.get("chat_template_kwargs") or {}
        return self.render(self._given(record, count), generation, record.get("tools"), arguments)

    def _given(self, record: Record, count: int) -> list[Mapping[str, Any]]:
        """Return a record's first messages as the template reads them.

        That of a multimodal model may take parts only, and tool calls have a form of their own.
        """
        messages: Messages = record["messages"][:count]
        first = next((at for at, message in enumerate(messages, 1) if message.get("tool_calls")), None)
        if first is not None:
            messages = self._call_form(record, first).of(messages)
        return [*(_in_parts(messages) if self._reads_parts else messages)]

    def _call_form(self, record: Record, first: int) -> CallForm:
        """Return the form of tool calls that the template takes, tried with a record's first call."""
        tools, arguments = record.get("tools"), record.get("chat_template_kwargs") or {}

        def render(messages: Messages) -> str:
            given = _in_parts(messages) if self._reads_parts else messages
            return self.render(given, False, tools, arguments)

        key = tools is not None  # there may be a template of its own for conversations with tools
        if key not in self._call_forms:
            form = form_taken(record["messages"][:first], render)
            if form is None:  # it is rejected whatever the form
                return CallForm()
            self._call_forms[key] = form
        return self._call_forms[key]

    @cached_property
    def _reads_parts(self) -> bool:
        probe = [{"role": "user", "content": NEXT}]

        def shows(messages: Messages) -> bool:
            try:
                return NEXT in self.render(messages, True, None, {})
            except DataError:
                return False

        return not shows(probe) and shows(_in_parts(probe))

    def _ended(self, answer: str, record: Record, index: int) -> tuple[str, str | None]:
        """Return an answer up to its end token, and that token.

        A template may write the end with the turn, or leave it to the role token of the next turn (GLM-4).
        """
        messages = record["messages"]
        if index + 1 < len(messages):
            following = messages[index + 1]["role"]
        else:
            following = "tool" if messages[index].get("tool_calls") else "user"
        found = self.ends_of(answer)
        closing = self._closing(following, record)
        if not found:
            first = next((token for token in self._specials if closing.lstrip().startswith(token)), None)
            if first is None:
                return answer, None
            space = closing[: closing.index(first)]
            return answer + ("" if answer.endswith(space) else space) + first, first
        # Phi-3.5 ends the turn, and after the last one the conversation; Cohere ends the response, then the turn.
        shared = [token for token in found if token in closing]
        end = self.eos if self.eos in (shared or found) else (shared or [*found][-1:])[0]
        assert end is not None
        return answer[: found[end]], end

    def ends_of(self, text: str) -> dict[str, int]:
        """Return the special tokens that a text ends in, apart from whitespace, each with where it first ends there."""
        found: dict[str, int] = {}
        text = text.rstrip()
        while token := next((token for token in self._specials if text.endswith(token)), None):
            found[token] = len(text)
            text = text.removesuffix(token).rstrip()
        return dict(reversed(found.items()))

    def _closing(self, role: str, record: Record) -> str:
        """Return what the template writes between an answer and a next message of a role; "" when it refuses that."""
        arguments = record.get("chat_template_kwargs") or {}
        key = role, json.dumps(arguments, sort_keys=True, default=str)
        if key not in self._closings:
            probe = [("user", "x"), ("assistant", ANSWER), (role, NEXT)]
            turns = [{"role": speaker, "content": content} for speaker, content in probe]
            messages = self._given({"messages": turns}, len(turns))
            try:
                text = self.render(messages, False, None, arguments)
            except DataError:
                self._closings[key] = self._closing("user", record) if role != "user" else ""
            else:
                self._closings[key] = text.rpartition(ANSWER)[2].partition(NEXT)[0] if NEXT in text else ""
        return self._closings[key]

    def _mismatch(self, record: Record, index: int, prompt: str, finished: str, suggest: bool) -> str:
        """Say that a finished turn does not begin as inference does, and which argument would fix that."""
        start = len(commonprefix([prompt, finished]))  # noqa: RUF071 of characters, as is wanted
        message = (
            f"message {index + 1}: inference starts it with {_short(prompt[start:])}, where the chat template writes "
            f"{_short(finished[start:])} for the finished turn, so it is not known what must be learnt; "
        )
        if record["messages"][index - 1]["role"] == "assistant":
            return message + "two of the assistant's turns follow one another: make them one"
        given = record.get("chat_template_kwargs") or {}
        for name in self.variables if suggest else ():
            for value in (False, True):
                try:
                    self.turn(record, index, {**given, name: value})
                except DataError:
                    continue
                return f'{message}set "chat_template_kwargs": {json.dumps({name: value})}'
        return message + "give the data in the template's own form, or set finetune.loss_on to 'all'"


def _in_parts(messages: Messages) -> list[dict[str, Any]]:
    """Return messages with their contents as lists of one part of text."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]} if "content" in message else {**message}
        for message in messages
    ]


def learnt(record: Record) -> list[int]:
    """Return the indices of a record's assistant turns that are learnt: those that say something, and are not switched
    off."""
    skipped = record.get("not_learnt", ())
    return [
        index
        for index, message in enumerate(record["messages"])
        if message["role"] == "assistant"
        and index not in skipped
        and (message.get("tool_calls") or any(message.get(name) for name in ("content", *REASONING)))
    ]


def last_answer(record: Record) -> int:
    """Return the index of a record's last assistant turn."""
    return max(index for index, message in enumerate(record["messages"]) if message["role"] == "assistant")


def _reasoning(message: Mapping[str, Any], tag: str) -> str:
    """Return the reasoning of a message: a field of its own, or what comes before the closing tag in its content."""
    for name in REASONING:
        if message.get(name):
            return str(message[name]).strip("\n")
    before, closed, _ = str(message.get("content") or "").rpartition(f"</{tag}>")
    return before.rpartition(f"<{tag}>")[2].strip("\n") if closed else ""


def _short(text: str, most: int = 40) -> str:
    return repr(text if len(text) <= most else text[:most] + "…")
