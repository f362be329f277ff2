"""The forms in which people keep conversations."""

# ruff: noqa: E501 -- a rendered line is easier to read in one piece

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from sqft.data.conversations import conversation_in
from sqft.data.records import read_records
from sqft.errors import DataError

ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": ASKED},
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
        {"conversations": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
        {"prompt": ASKED[:1], "completion": ASKED[1:]},
        {"prompt": ASKED[:1], "completion": ASKED[1]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]}, ASKED[1]]},
        {"messages": [{**ASKED[0], "name": None, "tool_calls": None}, {**ASKED[1], "weight": 1, "train": True}]},
        {"messages": ASKED, "tools": None, "chat_template_kwargs": "{}"},
    ],
)  # fmt: skip
def test_each_form_is_the_same_conversation(row: dict[str, Any]) -> None:
    assert conversation_in(row) == {"messages": ASKED}


def test_fields_beside_the_turns() -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {
        "system": "Be brief.",
        "conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4", "weight": 0}],
        "tools": json.dumps(tools),
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert conversation_in(row) == {
        "messages": [{"role": "system", "content": "Be brief."}, *ASKED],
        "tools": tools,
        "chat_template_kwargs": {"enable_thinking": False},
        "not_learnt": [2],
    }


def test_the_turns_of_a_prompt_are_not_learnt() -> None:
    row = {"prompt": [*ASKED, ASKED[0]], "completion": [ASKED[1]]}
    assert conversation_in(row) == {"messages": [*ASKED, *ASKED], "not_learnt": [1]}


def test_what_is_no_conversation() -> None:
    for row in (
        {"prompt": "a", "completion": "b", "conversations": ["x"], "chosen": "b", "rejected": "c"},
        {"text": "a"},
        {"instruction": "a", "output": "b"},
    ):
        assert conversation_in(row) is None


def test_an_empty_column_of_conversations_is_none(tmp_path: Path) -> None:
    row = {"prompt": "2+2?", "completion": "4", "messages": None}
    (tmp_path / "d.jsonl").write_text(json.dumps(row) + "\n")
    assert read_records(tmp_path / "d.jsonl") == [{"prompt": "2+2?", "completion": "4"}]


def test_an_empty_cell_of_a_csv_file_is_no_conversation(tmp_path: Path) -> None:
    (tmp_path / "d.csv").write_text("messages,prompt,completion\n,2+2?,4\n")
    assert read_records(tmp_path / "d.csv") == [{"prompt": "2+2?", "completion": "4"}]


def test_a_call_needs_no_content_and_its_fields_stay() -> None:
    call = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": null}'}}]
    messages = [
        ASKED[0],
        {"role": "assistant", "content": None, "tool_calls": call, "thinking": "Hm."},
        {"role": "tool", "tool_call_id": "1", "name": "add", "content": "4"},
        ASKED[1],
    ]
    found = conversation_in({"messages": messages})
    assert found is not None
    assert found["messages"] == [messages[0], {k: v for k, v in messages[1].items() if k != "content"}, *messages[2:]]


def test_a_table_fills_in_nulls_and_may_hold_json(tmp_path: Path) -> None:
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    called = {"role": "assistant", "content": None, "tool_calls": json.dumps(calls)}
    rows = [{"messages": ASKED}, {"messages": [ASKED[0], called, {"role": "tool", "content": "4"}, ASKED[1]]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    first, second = read_records(tmp_path / "d.parquet")
    assert first == {"messages": ASKED}
    assert second["messages"][1] == {"role": "assistant", "tool_calls": calls}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"messages": "hi"}, "'messages' must be a list of {role, content}"),
        ({"messages": ASKED[:1]}, "at least one assistant turn"),
        ({"messages": [{"content": "a"}, ASKED[1]]}, "message 1: has no 'role'"),
        ({"messages": [{"role": "user", "content": 4}, ASKED[1]]}, "message 1: 'content' is int, expected text"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": None}]}, "message 2 of role 'assistant' has no 'content'"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ASKED[1]]}, "message 1: a part of 'content' is 'image'"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, "'from' is 'narrator', which is no known role; known are human"),
        ({"prompt": ASKED[:1], "completion": "4"}, "must both be texts, or both lists"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences, which sqft does not train on"),
        ({"messages": [ASKED[0], {**ASKED[1], "weight": 0.5}]}, "message 2: 'weight' is 0.5; a turn is learnt or not"),
        ({"messages": [{**ASKED[0], "train": True}, ASKED[1]]}, "only the assistant's turns can be learnt"),
        ({"messages": ASKED, "tools": "add"}, "'tools' must be a JSON list"),
        ({"messages": [ASKED[0], {"role": "assistant", "content": "\ud83d"}]}, "half of a surrogate pair"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_line(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text(json.dumps({"messages": ASKED}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError) as caught:
        read_records(file)
    assert "d.jsonl:2: " in str(caught.value) and words in str(caught.value)


def test_messages_may_be_json_text_as_columns_of_tables_have_them() -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert conversation_in({"messages": json.dumps(messages)}) == {"messages": messages}
    with pytest.raises(DataError, match="'messages' must be"):
        conversation_in({"messages": "a talk"})
