"""The tokens of a turn, and which of them are learnt."""

from __future__ import annotations

import copy

import pytest
from transformers import ByT5Tokenizer

from sqft.data.chat_tokens import chat_of, tokens_of, turn_tokens
from sqft.data.encoding import IGNORED, Tokenization
from tests.support.chats import chat_tokenizer, conversation

RECORD = conversation(("user", "2+2?"), ("assistant", "4"))


def learnt(template: str, record: dict[str, object] = RECORD) -> tuple[str, str]:
    """Return a turn's prompt and the text of its answer that is learnt."""
    tokenizer = chat_tokenizer(template)
    prompt, answer, learns = turn_tokens(tokenizer, record, chat_of(tokenizer).turn(record, 1))
    return tokenizer.decode(prompt), tokenizer.decode([token for token, yes in zip(answer, learns, strict=True) if yes])


def test_marks_are_those_of_transformers() -> None:
    tokenizer = chat_tokenizer("qwen3_training")
    whole = tokenizer.apply_chat_template(RECORD["messages"], return_assistant_tokens_mask=True, return_dict=True)
    pairs = zip(whole["input_ids"], whole["assistant_masks"], strict=True)
    marked = tokenizer.decode([token for token, mark in pairs if mark])
    assert marked == learnt("qwen3_training")[1] + "\n"  # the line break after the end is not learnt


def test_the_end_is_learnt_where_the_mark_leaves_it_out() -> None:
    assert learnt("marked_without_end") == ("<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n", "4<|im_end|>")


def test_what_a_mark_leaves_out_is_not_learnt() -> None:
    noted = {"role": "assistant", "content": "4", "note": "sure"}
    assert learnt("marked_without_end", {"messages": [RECORD["messages"][0], noted]})[1] == "4<|im_end|>"
    tokenizer = copy.deepcopy(chat_tokenizer("marked_without_end"))
    silent = str(tokenizer.chat_template).replace("{{- m.content -}}{%- endgeneration", "{%- endgeneration", 1)
    tokenizer.chat_template = silent
    _, answer, learns = turn_tokens(tokenizer, RECORD, chat_of(tokenizer).turn(RECORD, 1))
    assert answer and not any(learns)


def test_a_token_across_the_boundary_is_split() -> None:
    """ "\\n" ends the prompt and "\\n4" begins the answer: as a whole they would be one token and the rest."""
    tokenizer = chat_tokenizer("qwen2_5")
    record = conversation(("user", "2+2?"), ("assistant", "\n4"))
    turn = chat_of(tokenizer).turn(record, 1)
    prompt, answer, _ = turn_tokens(tokenizer, record, turn)
    assert prompt == tokens_of(tokenizer, turn.prompt) and answer == tokens_of(tokenizer, turn.answer)
    assert prompt + answer != tokens_of(tokenizer, turn.text)


@pytest.mark.parametrize("template", ["cohere_like", "glm4moe"])
def test_a_chat_knows_the_tokenizers_special_tokens(template: str) -> None:
    chat = chat_of(chat_tokenizer(template))
    assert chat.turn(RECORD, 1).end == {"cohere_like": "<|END_OF_TURN_TOKEN|>", "glm4moe": "<|user|>"}[template]


def test_without_offsets_all_of_the_answer_is_learnt() -> None:
    """A tokenizer that is written in Python knows no offsets, by which a template's marks are found."""
    tokenizer = ByT5Tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>"], extra_ids=0)
    tokenizer.chat_template = chat_tokenizer("marked_without_end").chat_template
    (example,) = Tokenization(tokenizer, 500, "completion").encode_record(RECORD)
    assert "4<|im_end|>" in tokenizer.decode([label for label in example.labels if label != IGNORED])
