"""What is learnt of a conversation, written out by hand for each trait of chat templates."""

# ruff: noqa: E501 -- a rendered line is easier to read in one piece

from __future__ import annotations

import copy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sqft.data.chat_tokens import chat_of
from sqft.data.conversations import conversation_in
from sqft.data.encoding import IGNORED, Encoded, Tokenization, encode_prompt
from sqft.errors import DataError
from tests.support.chats import TEMPLATES, all_shown, chat_tokenizer, conversation, shown

THREE = [
    ("user", "2+2?"),
    ("assistant", "4"),
    ("user", "and 1?"),
    ("assistant", "5"),
    ("user", "so?"),
    ("assistant", "Done."),
]
WITHOUT_THINKING = {"enable_thinking": False}


def encoded(template: str, record: dict[str, Any], length: int = 5000, loss_on: Any = "completion") -> Encoded:
    return Tokenization(chat_tokenizer(template), length, loss_on).encode([record])


def texts(template: str, record: dict[str, Any], length: int = 5000, loss_on: Any = "completion") -> list[str]:
    return all_shown(chat_tokenizer(template), encoded(template, record, length, loss_on).examples)


CHATML = (
    "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n{}4<|im_end|>",
    "\n<|im_start|>user\nand 1?<|im_end|>\n<|im_start|>assistant\n{}5<|im_end|>",
    "\n<|im_start|>user\nso?<|im_end|>\n<|im_start|>assistant\n{}Done.<|im_end|>",
)
"""Three turns of ChatML; {} is what stands before an answer."""


def chatml(past: str, now: str) -> list[str]:
    """The three turns as three examples: `past` before an answer of the history, `now` before the one that is learnt."""
    done = [turn.format(past) for turn in CHATML]
    return ["".join(done[:n]) + CHATML[n].format(now) + "⟫" for n in range(3)]


EXPECTED: dict[tuple[str, bool], list[str]] = {
    ("qwen3", True): chatml("", "⟪<think>\n\n</think>\n\n"),
    ("qwen3", False): chatml("", "<think>\n\n</think>\n\n⟪"),
    # The prompt ends in one line break, and the whole would hold two in one token: what follows is the second alone.
    ("qwen3_5_think", True): chatml("", "<think>\n⟪\n</think>\n\n"),
    ("qwen3_5_think", False): chatml("", "<think>\n\n</think>\n\n⟪"),
    ("nemotron_like", True): chatml("<think></think>", "<think>\n⟪</think>"),
    ("nemotron_like", False): [
        CHATML[0].format("<think></think>⟪") + "⟫" + CHATML[1].format("<think></think>⟪") + "⟫"
        + CHATML[2].format("<think></think>⟪") + "⟫"
    ],
    ("deepseekv3", True): [
        "<bos><｜User｜>2+2?<｜Assistant｜><think>\n⟪\n</think>\n\n4<｜end▁of▁sentence｜>⟫",
        "<bos><｜User｜>2+2?<｜Assistant｜>4<｜end▁of▁sentence｜><｜User｜>and 1?<｜Assistant｜><think>\n"
        "⟪\n</think>\n\n5<｜end▁of▁sentence｜>⟫",
        "<bos><｜User｜>2+2?<｜Assistant｜>4<｜end▁of▁sentence｜><｜User｜>and 1?<｜Assistant｜>5<｜end▁of▁sentence｜>"
        "<｜User｜>so?<｜Assistant｜><think>\n⟪\n</think>\n\nDone.<｜end▁of▁sentence｜>⟫",
    ],
    ("glm4moe", True): [
        "[gMASK]<sop><|user|>\n2+2?<|assistant|>⟪\n<think></think>\n4<|user|>⟫\nand 1?<|assistant|>⟪\n<think></think>\n5"
        "<|user|>⟫\nso?<|assistant|>⟪\n<think></think>\nDone.<|user|>⟫"
    ],
    ("glm4moe", False): [
        "[gMASK]<sop><|user|>\n2+2?/nothink<|assistant|>\n<think></think>⟪\n4<|user|>⟫\nand 1?/nothink<|assistant|>\n"
        "<think></think>⟪\n5<|user|>⟫\nso?/nothink<|assistant|>\n<think></think>⟪\nDone.<|user|>⟫"
    ],
    ("phi3_5", True): [
        "<|user|>\n2+2?<|end|>\n<|assistant|>\n⟪4<|end|>⟫\n<|user|>\nand 1?<|end|>\n<|assistant|>\n⟪5<|end|>⟫\n<|user|>\n"
        "so?<|end|>\n<|assistant|>\n⟪Done.<|end|>⟫"
    ],
    ("qwen3_training", True): [
        CHATML[0].format("⟪<think>\n\n</think>\n\n") + "⟫" + CHATML[1].format("⟪<think>\n\n</think>\n\n") + "⟫"
        + CHATML[2].format("⟪<think>\n\n</think>\n\n") + "⟫"
    ],
    ("marked_without_end", True): [
        CHATML[0].format("⟪") + "⟫" + CHATML[1].format("⟪") + "⟫" + CHATML[2].format("⟪") + "⟫"
    ],
    ("parts_only", True): [
        CHATML[0].format("⟪") + "⟫" + CHATML[1].format("⟪") + "⟫" + CHATML[2].format("⟪") + "⟫"
    ],
    ("gemma_like", True): [
        "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟪4<end_of_turn>⟫\n<start_of_turn>user\nand 1?"
        "<end_of_turn>\n<start_of_turn>model\n⟪5<end_of_turn>⟫\n<start_of_turn>user\nso?<end_of_turn>\n<start_of_turn>"
        "model\n⟪Done.<end_of_turn>⟫"
    ],
    ("llama3_like", True): [
        "<bos><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟪4<|eot_id|>⟫<|start_header_id|>user<|end_header_id|>\n\nand 1?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n⟪5<|eot_id|>⟫<|start_header_id|>user<|end_header_id|>\n\nso?<|eot_id|><|start_header_id|>"
        "assistant<|end_header_id|>\n\n⟪Done.<|eot_id|>⟫"
    ],
    ("mistral_like", True): [
        "<bos>[INST] 2+2? [/INST]⟪ 4</s>⟫[INST] and 1? [/INST]⟪ 5</s>⟫[INST] so? [/INST]⟪ Done.</s>⟫"
    ],
    ("cohere_like", True): [
        "<bos><|START_OF_TURN_TOKEN|><|USER_TOKEN|>2+2?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
        "⟪<|START_RESPONSE|>4<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟫<|START_OF_TURN_TOKEN|><|USER_TOKEN|>and 1?"
        "<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟪<|START_RESPONSE|>5<|END_RESPONSE|>"
        "<|END_OF_TURN_TOKEN|>⟫<|START_OF_TURN_TOKEN|><|USER_TOKEN|>so?<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
        "<|CHATBOT_TOKEN|>⟪<|START_RESPONSE|>Done.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>⟫"
    ],
    ("without_end", True): [
        "### Instruction:\n2+2?\n\n### Response:\n⟪4\n\n⟫### Instruction:\nand 1?\n\n### Response:\n⟪5\n\n⟫"
        "### Instruction:\nso?\n\n### Response:\n⟪Done.\n\n⟫"
    ],
}  # fmt: skip
"""What is learnt of `THREE` in each template; whether it may think."""


@pytest.mark.parametrize(("template", "thinks"), EXPECTED)
def test_what_is_learnt_of_three_turns(template: str, thinks: bool) -> None:
    record = conversation(*THREE, **({} if thinks else {"chat_template_kwargs": WITHOUT_THINKING}))
    assert texts(template, record) == EXPECTED[template, thinks]
    result = encoded(template, record)
    assert result.answers == 3 and result.ends.total() == (0 if template == "without_end" else 3)
    assert result.rewritten == (len(result.examples) > 1)
    assert ("template rewrites earlier turns" in (result.note() or "")) == (len(result.examples) > 1)
    assert ("no end of turn" in (result.warning() or "")) == (template == "without_end")


def test_the_last_turn_of_gpt_oss_ends_in_another_token() -> None:
    found = texts("gptoss", conversation(*THREE))
    assert [text.partition("<|start|>user")[2] for text in found] == [
        "<|message|>2+2?<|end|><|start|>assistant⟪<|channel|>final<|message|>4<|return|>⟫",
        "<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4<|end|><|start|>user<|message|>and 1?<|end|>"
        "<|start|>assistant⟪<|channel|>final<|message|>5<|return|>⟫",
        "<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4<|end|><|start|>user<|message|>and 1?<|end|>"
        "<|start|>assistant<|channel|>final<|message|>5<|end|><|start|>user<|message|>so?<|end|>"
        "<|start|>assistant⟪<|channel|>final<|message|>Done.<|return|>⟫",
    ]


def test_a_system_turn_and_tools() -> None:
    """The tool loop of one user turn is one history, in which reasoning stays; the template sees every field."""
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
    record = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "", "reasoning_content": "Use the tool.", "tool_calls": [call]},
            {"role": "tool", "name": "add", "content": "4"},
            {"role": "assistant", "content": "It is 4.", "reasoning_content": "The tool says so."},
        ],
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {}}}],
    }
    (text,) = texts("qwen3", record)
    head, _, rest = text.partition("<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nBe brief.\n\n# Tools") and '"name": "add"' in head
    assert rest == (
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
        '⟪<think>\nUse the tool.\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
        "<|im_end|>⟫\n<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
        "⟪<think>\nThe tool says so.\n</think>\n\nIt is 4.<|im_end|>⟫"
    )
    (text,) = texts("glm4moe", record)  # a call ends where its result begins
    assert text.endswith(
        "<|user|>\n2+2?<|assistant|>⟪\n<think>Use the tool.</think>\n<tool_call>add\n<arg_key>a</arg_key>\n"
        "<arg_value>2</arg_value>\n<arg_key>b</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>⟫\n"
        "<tool_response>\n4\n</tool_response><|assistant|>⟪\n<think>The tool says so.</think>\nIt is 4.<|user|>⟫"
    )


def test_reasoning_closes_the_block_that_the_prompt_opens() -> None:
    asked = {"role": "user", "content": "2+2?"}
    for answer in (
        {"role": "assistant", "content": "4", "reasoning_content": "Two twos."},
        {"role": "assistant", "content": "<think>\nTwo twos.\n</think>4"},
    ):
        assert texts("deepseekv3", {"messages": [asked, answer]}) == [
            "<bos><｜User｜>2+2?<｜Assistant｜><think>\n⟪Two twos.\n</think>\n\n4<｜end▁of▁sentence｜>⟫"
        ]
    answer = {"role": "assistant", "content": "4", "reasoning_content": "Two twos."}
    assert texts("nemotron_like", {"messages": [asked, answer]}) == [
        "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n<think>\n⟪Two twos.\n</think>\n4<|im_end|>⟫"
    ]


def test_a_turn_that_does_not_begin_as_inference_does_is_refused_with_what_to_set() -> None:
    thinking = {"role": "assistant", "content": "4", "reasoning_content": "Two twos."}
    record = {"messages": [{"role": "user", "content": "2+2?"}, thinking], "chat_template_kwargs": WITHOUT_THINKING}
    with pytest.raises(DataError) as caught:
        encoded("qwen3_5_think", record)
    assert str(caught.value) == (
        "record 1: message 2: inference starts it with '\\n</think>\\n\\n', where the chat template writes "
        "'Two twos.\\n</think>\\n\\n4<|im_end|>\\n' for the finished turn, so it is not known what must be learnt; "
        'set "chat_template_kwargs": {"enable_thinking": true}'
    )
    assert len(texts("qwen3_5_think", record, loss_on="all")) == 1
    strange = copy.deepcopy(chat_tokenizer("llama3_like"))
    strange.chat_template = str(strange.chat_template).replace("{{- bos_token -}}", "{{- messages | length -}}")
    with pytest.raises(
        DataError, match=r"it is not known what must be learnt; give the data in the template's own form"
    ):
        Tokenization(strange, 500, "completion").encode([conversation(*THREE)])


def test_a_turn_that_is_switched_off_is_history_only() -> None:
    record = conversation(*THREE, not_learnt=[1, 5])
    assert texts("llama3_like", record) == [
        "<bos><|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "4<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nand 1?<|eot_id|><|start_header_id|>assistant"
        "<|end_header_id|>\n\n⟪5<|eot_id|>⟫"
    ]
    (whole,) = texts("llama3_like", record, loss_on="all")
    assert whole.count("⟪") == 2 and "⟫4<|eot_id|>⟪<|start" in whole and "⟫Done.<|eot_id|>" in whole
    with pytest.raises(DataError, match=r"cannot be found; set finetune\.loss_on to 'completion'"):
        encoded("qwen3", record, loss_on="all")
    with pytest.raises(DataError, match=r"no turn of the assistant is to be learnt$"):
        encoded("llama3_like", conversation(*THREE, not_learnt=[1, 3, 5]))


def test_the_whole_of_a_conversation_ends_at_its_end() -> None:
    (whole,) = texts("glm4moe", conversation(*THREE), loss_on="all")
    assert whole.startswith("⟪[gMASK]<sop>") and whole.endswith("\n<think></think>\nDone.<|user|>⟫")
    (whole,) = texts("gemma_like", conversation(*THREE), loss_on="all")
    assert whole.endswith("Done.<end_of_turn>⟫")


def test_a_cut_example_says_what_is_left() -> None:
    (example,) = encoded("llama3_like", conversation(*THREE), length=30).examples
    assert shown(chat_tokenizer("llama3_like"), example).endswith("⟪Done.<|eot_id|>⟫")
    assert (example.answers, len(example.ends), len(example.input_ids)) == (1, 1, 30)
    (example,) = encoded("llama3_like", conversation(*THREE), length=4).examples
    assert shown(chat_tokenizer("llama3_like"), example) == "\n\n⟪Don⟫"
    assert (example.answers, example.ends) == (1, ())
    assert "1 of 1 examples hold no end of turn" in str(
        encoded("llama3_like", conversation(*THREE), length=4).warning()
    )


def test_answers_that_are_cut_away_are_counted() -> None:
    """Of a long conversation in one example the first answers go; what is left of one without its prompt does not
    count."""
    whole = encoded("qwen2_5", conversation(*THREE)).examples[0]
    (example,) = encoded("qwen2_5", conversation(*THREE), length=len(whole.input_ids) - 1).examples
    assert (whole.answers, whole.lost, example.answers, example.lost) == (3, 0, 3, 0)
    short = encoded("qwen2_5", conversation(*THREE), length=40)
    (example,) = short.examples
    assert example.answers + example.lost == 3 and example.lost > 0
    assert len(example.ends) == example.answers
    assert f"{example.lost} answers were cut away" in str(short.note())


def test_a_conversation_cut_at_the_right_loses_its_last_answers() -> None:
    """At every length: the beginning of the whole, with the answers that have a label left, and their ends."""
    tokenizer, record = chat_tokenizer("qwen2_5"), conversation(*THREE)
    (whole,) = encoded("qwen2_5", record).examples
    begins = [i for i, label in enumerate(whole.labels) if label != IGNORED and whole.labels[i - 1] == IGNORED]
    assert len(begins) == 3
    for length in range(begins[0] + 1, len(whole.input_ids) + 1):
        found = Tokenization(tokenizer, length, "completion", "right").encode([record])
        (example,) = found.examples
        assert (example.input_ids, example.labels) == (whole.input_ids[:length], whole.labels[:length])
        answers = sum(begin < length for begin in begins)
        assert (example.answers, example.lost) == (answers, 3 - answers)
        learnt = [label for label in example.labels if label != IGNORED]
        assert len(example.ends) == learnt.count(tokenizer.convert_tokens_to_ids("<|im_end|>"))
        assert (f"{example.lost} answers were cut away" in str(found.note())) == (example.lost > 0)
    with pytest.raises(DataError, match="all 1 examples are longer"):
        Tokenization(tokenizer, begins[0], "completion", "right").encode([record])


def test_of_a_conversation_in_several_examples_those_that_are_too_long_are_left_out() -> None:
    tokenizer, record = chat_tokenizer("qwen3"), conversation(*THREE)
    record["chat_template_kwargs"] = WITHOUT_THINKING
    whole = encoded("qwen3", record).examples
    lengths = [len(example.input_ids) for example in whole]
    assert len(whole) == 3 and lengths == sorted(lengths)
    found = Tokenization(tokenizer, lengths[1], "completion", "drop").encode([record])
    assert found.examples == whole[:2] and (found.sizes, found.dropped, found.rewritten) == ([2], 1, 1)
    assert found.unwritten == 0 and "cut away" not in str(found.note())


def test_a_cut_at_the_left_that_leaves_nothing_to_learn() -> None:
    """The last answer is switched off, and longer than all that may stay."""
    record = {"messages": [{"role": role, "content": content} for role, content in THREE]}
    record["messages"][-1] |= {"train": False, "content": "Done. " * 20}
    with pytest.raises(
        DataError, match=r'all 1 examples .* truncation "left" leaves nothing .* raise finetune\.max_length$'
    ):
        encoded("llama3_like", conversation_in(record) or {}, length=20, loss_on="all")


@pytest.mark.parametrize("template", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
def test_an_evaluation_asks_what_training_has_taught(template: str) -> None:
    tokenizer, record = chat_tokenizer(template), conversation(*THREE)
    prompt = encode_prompt(record, tokenizer)
    example = Tokenization(tokenizer, 5000, "completion").encode_record(record)[-1]
    assert list(example.input_ids[: len(prompt.ids)]) == prompt.ids
    after = [label for label in example.labels[len(prompt.ids) :] if label != IGNORED]
    assert prompt.completion.strip() == "Done."
    if template != "marked_without_end":  # reasoning that training closes is no part of what is compared
        assert tokenizer.decode(after, skip_special_tokens=True).endswith(prompt.completion)
    if template == "without_end":
        assert prompt.end is None
    else:
        assert prompt.end == after[-1] == example.input_ids[-1]


def test_a_refusal_is_explained() -> None:
    record = conversation(("system", "Be brief."), *THREE)
    with pytest.raises(DataError, match=r"^record 1: the chat template rejects the conversation: System role not"):
        encoded("gemma_like", record)
    with pytest.raises(DataError, match="has no prompt; add a user turn"):
        encoded("qwen3", conversation(("assistant", "4")))
    bare = copy.deepcopy(chat_tokenizer("llama3_like"))
    bare.chat_template = None
    with pytest.raises(DataError, match=r"has no chat template; use {prompt, completion} records"):
        Tokenization(bare, 500, "completion").encode([conversation(*THREE)])


STABLE = ("llama3_like", "gemma_like", "cohere_like", "qwen2_5", "glm4moe", "phi3_5", "qwen3_training")
words = st.text("ab \n<>é4", min_size=1, max_size=6).filter(str.strip)
begun = words.filter(lambda text: not text.startswith("\n"))  # one more line break would join that of the prompt


@settings(max_examples=60, deadline=None)
@given(template=st.sampled_from(STABLE), said=st.lists(st.tuples(words, begun), min_size=1, max_size=4))
def test_a_stable_history_is_one_example(template: str, said: list[tuple[str, str]]) -> None:
    """Its tokens are those of the conversation as a whole, and each history is what inference is given."""
    tokenizer = chat_tokenizer(template)
    turns = [turn for user, answer in said for turn in (("user", user), ("assistant", answer))]
    messages = conversation(*turns)["messages"]
    (example,) = Tokenization(tokenizer, 5000, "completion").encode_record({"messages": messages})
    asked = [*messages, {"role": "user", "content": "x"}]
    whole = tokenizer.apply_chat_template(asked, tokenize=True, return_dict=False)
    assert list(example.input_ids) == whole[: len(example.input_ids)]
    begins = [i for i, label in enumerate(example.labels) if label != IGNORED and example.labels[i - 1] == IGNORED]
    prompts = [
        tokenizer.apply_chat_template(messages[:index], tokenize=True, return_dict=False, add_generation_prompt=True)
        for index in range(1, len(messages), 2)
    ]
    assert begins == [len(prompt) for prompt in prompts]
    assert all(list(example.input_ids[: len(prompt)]) == prompt for prompt in prompts)


@settings(max_examples=40, deadline=None)
@given(
    template=st.sampled_from(("qwen3", "qwen3_5_think", "deepseekv3", "nemotron_like", "mistral_like")),
    said=st.lists(st.tuples(words, words), min_size=1, max_size=3),
)
def test_every_history_is_what_inference_is_given(template: str, said: list[tuple[str, str]]) -> None:
    tokenizer = chat_tokenizer(template)
    turns = [turn for user, answer in said for turn in (("user", user), ("assistant", answer))]
    messages = conversation(*turns)["messages"]
    examples = Tokenization(tokenizer, 5000, "completion").encode_record({"messages": messages})
    found = {
        tuple(example.input_ids[:place])
        for example in examples
        for place in range(1, len(example.labels))
        if example.labels[place] != IGNORED and example.labels[place - 1] == IGNORED
    }
    assert found == {
        tuple(tokenizer.apply_chat_template(messages[:i], tokenize=True, return_dict=False, add_generation_prompt=True))
        for i in range(1, len(messages), 2)
    }


def test_a_template_is_tried_with_its_own_arguments_only() -> None:
    """The end of a turn is looked for once for each set of arguments."""
    chat = chat_of(chat_tokenizer("glm4moe"))
    calls = []
    render = chat.render
    chat.render = lambda *given: calls.append(given) or render(*given)
    for _ in range(3):
        list(chat.turns(conversation(*THREE)))
    probes = [messages for messages, *_ in calls if any("sqft-next" in m["content"] for m in messages)]
    assert len(probes) == 2  # whether contents are texts, and what follows an answer


CALL = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


@pytest.mark.parametrize("template", ["qwen2_5", "glm4moe", "qwen3_5_think", "gptoss", "deepseekv3"])
@pytest.mark.parametrize("as_text", [True, False])
def test_arguments_of_tool_calls_are_written_once(template: str, as_text: bool) -> None:
    """OpenAI's form has them as JSON text, others as an object; templates expect the one or the other."""
    arguments = CALL["function"]["arguments"] if as_text else {"a": 1}
    calls = [{**CALL, "id": "c1", "function": {**CALL["function"], "arguments": arguments}}]
    messages = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": calls}]
    record = conversation_in({"messages": messages})
    assert record is not None
    text = "".join(texts(template, record))
    assert "add" in text and '\\"a' not in text
    if template != "glm4moe" and template != "qwen3_5_think":  # these write each argument by itself
        assert '{"a": 1}' in text


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{{ m['content'] + '' }}{{ (m.tool_calls or []) | map(attribute='arguments') | list | tojson }}",
            '[{"a": 1}]',
        ),
        ("{% for call in m.tool_calls or [] %}{{ call.arguments }}{% endfor %}", '{"a": 1}'),
    ],
)
def test_arguments_are_written_as_json_where_a_template_needs_more(template: str, text: str, arguments: Any) -> None:
    """A template may need a content beside the call, or print the arguments as they are."""
    tokenizer = copy.deepcopy(chat_tokenizer("qwen2_5"))
    tokenizer.chat_template = (
        f"{{% for m in messages %}}<|im_start|>{{{{ m.role }}}} {template}<|im_end|>{{% endfor %}}"
        "{% if add_generation_prompt %}<|im_start|>assistant {% endif %}"
    )
    called = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": arguments}]}
    record = {"messages": [{"role": "user", "content": "1+1?"}, called]}
    assert encode_prompt(record, tokenizer).completion == text


def test_arguments_that_are_no_object_are_refused_where_one_is_taken() -> None:
    called = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "a=2"}]}
    with pytest.raises(DataError, match=r"message 2: the chat template takes the arguments of a tool call as an obj"):
        encoded("glm4moe", {"messages": [{"role": "user", "content": "1+1?"}, called]})


@pytest.mark.parametrize("template", ["llama3_like", "mistral_like", "cohere_like", "nemotron_like", "phi3_5"])
def test_a_turn_of_which_the_template_writes_nothing_is_not_learnt(template: str) -> None:
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    asked = [{"role": "user", "content": "1+1?"}, called, {"role": "user", "content": "so?"}]
    record = {"messages": [*asked, {"role": "assistant", "content": "2"}]}
    learnt = [turn.answer for turn in chat_of(chat_tokenizer(template)).turns(record)]
    assert len(learnt) == 1 and "2" in learnt[0]
    with pytest.raises(DataError, match=r"no turn of the assistant is to be learnt: the chat template writes nothing"):
        encoded(template, {"messages": asked[:2]})
    note = "turns of the assistant that are not learnt: 1, each since the chat template writes nothing of it"
    assert note in str(encoded(template, record).note())


@pytest.mark.parametrize(
    ("template", "marker", "reasons"),
    [
        ("gptoss", "<|channel|>final<|message|>", False),
        ("deepseekv3", "</think>", True),
        ("qwen3", "</think>", False),
        ("qwen2_5", "", False),
    ],
)
def test_what_comes_before_an_answer(template: str, marker: str, reasons: bool) -> None:
    short = encode_prompt(conversation(("user", "?"), ("assistant", "n")), chat_tokenizer(template))
    assert (short.marker, short.completion.strip()) == (marker, "n")  # a letter of the token that ends the turn
    prompt = encode_prompt(conversation(*THREE), chat_tokenizer(template))
    assert (prompt.marker, prompt.reasons) == (marker, reasons)
