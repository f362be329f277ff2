"""A chat template renders without transformers as it does with it."""

from __future__ import annotations

from typing import Any

import pytest

from sqft.data.chat_template import ChatTemplate, is_marked, variables_of
from sqft.errors import DataError
from tests.support.chats import TEMPLATES, chat_tokenizer, conversation

TURNS = conversation(("user", "2+2?"), ("assistant", "<think>\nHm.\n</think>\n4"), ("user", "é"), ("assistant", "ü"))
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": "<é>"}}}
CALLS = {
    "messages": [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "reasoning_content": "Use it.", "tool_calls": [CALL]},
        {"role": "tool", "content": "4"},
    ],
    "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}],
}
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja"))


def template_of(name: str) -> ChatTemplate:
    tokenizer = chat_tokenizer(name)
    tokens = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if isinstance(value, str)}
    return ChatTemplate({"default": str(tokenizer.chat_template)}, tokens, ())


@pytest.mark.parametrize("record", [TURNS, CALLS], ids=["turns", "calls"])
@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_as_transformers_renders_it(name: str, arguments: dict[str, Any], record: dict[str, Any]) -> None:
    for count in range(1, len(record["messages"]) + 1):
        for generation in (False, True):
            messages, tools = record["messages"][:count], record.get("tools")
            try:
                expected = chat_tokenizer(name).apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=generation, **arguments
                )
            except Exception:
                with pytest.raises(DataError, match="the chat template rejects the conversation"):
                    template_of(name).render(messages, generation, tools, arguments)
            else:
                assert template_of(name).render(messages, generation, tools, arguments) == expected


def test_the_arguments_that_a_template_reads() -> None:
    assert "enable_thinking" in template_of("qwen3").variables()
    assert template_of("llama3_like").variables() == []
    assert variables_of("{% if %}") is None


def test_a_template_for_tools_has_a_name_of_its_own() -> None:
    template = ChatTemplate({"default": "plain", "tool_use": "tools"}, {}, ())
    assert template.render([], True, None, {}) == "plain" and template.render([], True, [{}], {}) == "tools"


def test_marks() -> None:
    assert [name for name in NAMES if is_marked(str(chat_tokenizer(name).chat_template))] == [
        "marked_without_end", "qwen3_training",
    ]  # fmt: skip
