"""A plan refuses conversations that the model's chat template refuses, and says what it makes of the others."""

# ruff: noqa: E501 -- a rendered line is easier to read in one piece

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Plan, Recipe, Registry
from sqft.errors import RecipeError
from tests.support.chats import ENDS, TEMPLATES, chat_tokenizer, conversation

TURNS = [("user", "2+2?"), ("assistant", "4"), ("user", "and 1?"), ("assistant", "5")]


@pytest.fixture
def planned(raw: dict[str, Any], registry: Registry, model_folder: Path, tmp_path: Path) -> Any:
    """Plan the tiny recipe on conversations, in the chat template of a name, with changes to its sections."""

    def plan(template: str | None, records: list[dict[str, Any]], **changes: dict[str, Any]) -> Plan:
        folder = tmp_path / "model"
        if not folder.exists():
            shutil.copytree(model_folder, folder)
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / file).unlink(missing_ok=True)
        chat_tokenizer(template or "llama3_like").save_pretrained(folder)
        if template is None:
            (folder / "chat_template.jinja").unlink()
        data = tmp_path / "talk.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        raw["model"] = {"path": str(folder), **changes.get("model", {})}
        raw["finetune"] |= {"data": {"path": str(data), **changes.get("data", {})}, **changes.get("finetune", {})}
        raw["evaluate"]["exact_match"]["data"] = str(data)
        return Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))

    return plan


def refusal(planned: Any, *args: Any, **changes: Any) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        planned(*args, **changes)
    return [str(problem) for problem in caught.value.problems]


def test_what_the_template_makes_of_the_turns_is_said(planned: Any) -> None:
    rewrites = "finetune.data: one example for each assistant turn: the chat template rewrites earlier turns"
    closes = "finetune.data: the generation prompt opens a block of reasoning, and what is learnt closes it"
    endless = "finetune.data: the chat template ends an assistant turn with no special token, so the model will not learn to stop"
    said = {
        "qwen3": [rewrites],
        "deepseekv3": [rewrites, closes],
        "without_end": [endless],
        "glm4moe": [],
        "phi3_5": [],
    }
    for template, notes in said.items():
        assert [note for note in planned(template, [conversation(*TURNS)]).notes if "finetune" in note] == notes
    assert not [note for note in planned("qwen3", [conversation(*TURNS[:2])]).notes if "finetune" in note]


def test_no_template_and_a_system_turn_that_is_refused(planned: Any) -> None:
    without = refusal(planned, None, [conversation(*TURNS)])
    assert [message.partition(": ")[0] for message in without] == [
        "finetune.data.path",
        "evaluate.exact_match.data.path",
    ]
    assert all("talk.jsonl:1: the model's tokenizer has no chat template; use" in message for message in without)
    records = [conversation(*TURNS)] * 300 + [conversation(("system", "Be brief."), *TURNS)]
    message, _ = refusal(planned, "gemma_like", records)
    assert message.startswith("finetune.data.path: ")
    assert message.endswith("talk.jsonl:301: the chat template rejects the conversation: System role not supported")


def test_arguments(planned: Any) -> None:
    records = [conversation(*TURNS)]
    for place in ("model", "data"):
        given = {place: {"chat_template_kwargs": {"enable_thinkin": False}}}
        message = refusal(planned, "qwen3", records, **given)[0]
        assert "the chat template has no argument 'enable_thinkin'; it reads content, enable_thinking" in message
    with pytest.raises(RecipeError, match="'tokenize' is no argument of a chat template"):
        planned("qwen3", records, model={"chat_template_kwargs": {"tokenize": False}})
    first = planned("qwen3", records)
    other = planned("qwen3", records, model={"chat_template_kwargs": {"enable_thinking": False}})
    names = [step.name for step in first.steps if step.fingerprint != other.step(step.name).fingerprint]
    assert "finetune" in names and "evaluate:merge" in names


def test_a_turn_that_does_not_fit_its_prompt_is_refused_with_what_to_set(planned: Any) -> None:
    thinking = {"role": "assistant", "content": "4", "reasoning_content": "Two twos."}
    record = {"messages": [{"role": "user", "content": "2+2?"}, thinking]}
    planned("qwen3_5_think", [record])
    (message,) = refusal(planned, "qwen3_5_think", [record], data={"chat_template_kwargs": {"enable_thinking": False}})
    assert message.endswith('set "chat_template_kwargs": {"enable_thinking": true}')
    plan = planned(
        "qwen3_5_think",
        [record],
        data={"chat_template_kwargs": {"enable_thinking": False}},
        finetune={"loss_on": "all"},
    )
    assert plan.step("finetune")


def test_nothing_to_learn(planned: Any) -> None:
    off = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "train": False}]}
    (message,) = refusal(planned, "qwen3", [conversation(*TURNS), off])
    assert message.endswith("talk.jsonl:2: no turn of the assistant is to be learnt")


def test_every_template_here_is_planned(planned: Any) -> None:
    for path in TEMPLATES.glob("*.jinja"):
        assert path.stem in ENDS or chat_tokenizer(path.stem).eos_token == "<|im_end|>"
        assert planned(path.stem, [conversation(*TURNS)]).steps


def test_turns_that_the_template_does_not_write_are_said(planned: Any) -> None:
    call = {"function": {"name": "add", "arguments": '{"a": 1}'}}
    called = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    talk = {"messages": [*called, {"role": "user", "content": "so?"}, {"role": "assistant", "content": "2"}]}
    notes = [note for note in planned("llama3_like", [{**talk, "tools": [call]}]).notes if "finetune.data" in note]
    assert any("does not read tools" in note for note in notes) and any("they are not learnt" in note for note in notes)
    assert not any("learnt" in note for note in planned("qwen2_5", [talk]).notes)
    (message, *_) = refusal(planned, "llama3_like", [{"messages": called}])
    assert "talk.jsonl:1: no turn of the assistant is to be learnt: the chat template writes nothing of it" in message


def test_a_template_that_writes_the_date_is_said(planned: Any) -> None:
    assert any("today's date" in note for note in planned("gptoss", [conversation(*TURNS)]).notes)
    assert not any("today's date" in note for note in planned("qwen2_5", [conversation(*TURNS)]).notes)
