"""The chat template of a model's folder, rendered without transformers: a plan tries a recipe's conversations with it.

Training and evaluation render through the tokenizer itself; a test holds the two against each other.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import Template, TemplateError, meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from sqft.data.chats import REASONING, Chat, Messages
from sqft.errors import DataError

GIVEN = {"messages", "add_generation_prompt", "bos_token", "eos_token", "pad_token", "unk_token"}
"""Variables that every template gets, whatever the recipe says."""

RESERVED = GIVEN | {
    "tools",
    "conversation",
    "chat_template",
    "continue_final_message",
    "tokenize",
    "padding",
    "truncation",
    "max_length",
    "return_tensors",
    "return_dict",
    "return_assistant_tokens_mask",
    "tokenizer_kwargs",
    "sanitize_control_tokens",
}
"""Names that `chat_template_kwargs` may not have: they are arguments of transformers' `apply_chat_template`."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template as a model's folder has it.

    Args:
        sources: its text, by name: "default", and possibly "tool_use" for conversations with tools.
        tokens: the named special tokens that it may write, such as "eos_token".
        specials: all special tokens of the tokenizer.
    """

    sources: Mapping[str, str]
    tokens: Mapping[str, str]
    specials: tuple[str, ...]

    def chat(self) -> Chat:
        """Return what finds the turns of conversations in this template."""
        tokens = self.tokens
        return Chat(
            self.render, self.specials, tokens.get("eos_token"), tokens.get("bos_token"), self.variables() or ()
        )

    def variables(self) -> list[str] | None:
        """Return the arguments that the template reads besides what it is always given; None if it cannot be parsed."""
        found = [variables_of(source) for source in self.sources.values()]
        return None if None in found else sorted({name for names in found for name in names or ()})

    def reads_tools(self) -> bool:
        """Return whether a template reads the tools of a conversation."""
        return any(re.search(r"\btools\b", source) for source in self.sources.values())

    def writes_the_date(self) -> bool:
        """Return whether a template writes the day on which it is rendered."""
        return any("strftime_now" in source for source in self.sources.values())

    def render(self, messages: Messages, generation: bool, tools: Any, arguments: Mapping[str, Any]) -> str:
        """Return messages as text.

        Raises:
            DataError: when the template rejects them.
        """
        name = "tool_use" if tools is not None and "tool_use" in self.sources else "default"
        try:
            return _compiled(self.sources[name]).render(
                messages=[_aliased(message) for message in messages],
                tools=tools,
                documents=None,
                add_generation_prompt=generation,
                **{**self.tokens, **arguments},
            )
        except Exception as error:  # a template's expressions can raise anything
            raise rejection(error) from None


def rejection(error: Exception) -> DataError:
    """Return the error that says why a template rejects a conversation."""
    kind = "" if isinstance(error, TemplateError) else f"{type(error).__name__}: "
    return DataError(f"the chat template rejects the conversation: {kind}{error}")


@cache
def variables_of(source: str) -> list[str] | None:
    """Return the names that a template reads besides `GIVEN`; None when it cannot be parsed."""
    try:
        names = meta.find_undeclared_variables(_environment().parse(source))
    except TemplateError:
        return None
    return sorted(names - GIVEN - {"tools", "documents"} - set(_environment().globals))


def is_marked(source: str) -> bool:
    """Return whether a template marks what the assistant says, with {% generation %}."""
    return "endgeneration" in source


def _aliased(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with its reasoning under the names that templates read, as transformers hands it over."""
    fields = {name: value for name, value in message.items() if value is not None}
    reasoning = next((fields[name] for name in REASONING if name in fields), None)
    return fields if reasoning is None else {"thinking": reasoning, **fields, "reasoning_content": reasoning}


class _Generation(Extension):
    """Reads {% generation %} … {% endgeneration %} as its body."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


@cache
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals |= {"raise_exception": _refuse, "strftime_now": _now}
    return environment


def _to_json(value: Any, **options: Any) -> str:
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
