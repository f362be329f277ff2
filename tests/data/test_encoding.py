"""Records become the tokens they should, and answers compare as people would."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sqft.data.encoding import IGNORED, answer_of, encode, encode_all, prompt_ids, prompts_of
from sqft.data.records import read_records
from sqft.data.windows import text_windows
from sqft.errors import DataError


def test_completion_carries_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,), cut = encode({"prompt": "2+2=", "completion": "4"}, tokenizer, 32, "completion")
    assert cut == 0
    assert tokenizer.decode(example.input_ids) == "2+2=4<|im_end|>"
    assert [label for label in example.labels if label != IGNORED] == list(example.input_ids[-2:])
    assert prompt_ids({"prompt": "2+2=", "completion": "4"}, tokenizer) == (list(example.input_ids[:-2]), "4")
    (everything,), _ = encode({"prompt": "2+2=", "completion": "4"}, tokenizer, 32, "all")
    assert everything.labels == everything.input_ids


def test_long_prompts_lose_their_start(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,), cut = encode({"prompt": "abcdefghij", "completion": "XY"}, tokenizer, 8, "completion")
    assert cut == 5 and tokenizer.decode(example.input_ids) == "fghijXY<|im_end|>"
    (example,), cut = encode({"prompt": "ab", "completion": "0123456789"}, tokenizer, 8, "completion")
    assert tokenizer.decode(example.input_ids) == "b0123456" and cut == 5
    (example,), _ = encode({"prompt": "abcdefghij", "completion": "XY"}, tokenizer, 8, "all")
    assert tokenizer.decode(example.input_ids) == "fghijXY<|im_end|>" and example.labels == example.input_ids
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "abcdefghij", "completion": "XY"}]
    encoded = encode_all(records, tokenizer, 8, "completion")
    assert (encoded.truncated, encoded.tokens_cut) == (1, 5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefghij", ["abcd", "efgh", "ij<|im_end|>"]),  # ends where the text ends, and nowhere else
        ("abcd", ["abcd"]),  # an end alone has nothing to be learnt from
        ("ab", ["ab<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_a_long_text_is_several_examples(
    tokenizer: PreTrainedTokenizerFast, text: str, expected: list[str], loss_on: str
) -> None:
    encoded = encode_all([{"text": text}], tokenizer, 4, loss_on)
    assert [tokenizer.decode(example.input_ids) for example in encoded.examples] == expected
    assert all(example.labels == example.input_ids for example in encoded.examples)
    assert (encoded.truncated, encoded.tokens_cut) == (0, 0)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_long_conversations_keep_their_last_answer(tokenizer: PreTrainedTokenizerFast, loss_on: str) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,), _ = encode(record, tokenizer, 20, loss_on)
    assert tokenizer.decode(example.input_ids).endswith("|>assistant\nno<|im_end|>\n")
    (example,), _ = encode(record, tokenizer, 3, "completion")
    assert tokenizer.decode(example.input_ids) == "\nno" and example.labels[1:] == example.input_ids[1:]


def test_only_the_assistants_turns_carry_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,), _ = encode(record, tokenizer, 500, "completion")
    kept = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(kept) == "yes<|im_end|>\nno<|im_end|>\n"
    ids, reference = prompt_ids(record, tokenizer)
    assert reference == "no" and tokenizer.decode(ids).endswith("<|im_start|>assistant\n")


def test_text_and_nothing_to_learn(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,), _ = encode({"text": "ab"}, tokenizer, 8, "completion")
    assert example.labels == example.input_ids and len(example.labels) == 3
    with pytest.raises(DataError, match=r"^record 1: there is no token to learn from"):
        encode_all([{"prompt": "a", "completion": ""}], tokenizer, 8, "completion")
    with pytest.raises(DataError, match="no completion"):
        prompt_ids({"text": "a"}, tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "d.jsonl:2: not valid JSON"),
        ("[1]", "d.jsonl:2: expected a JSON object with 'prompt' and 'completion'.*found list"),
        ('{"prompt": "a"}', "d.jsonl:2: .*'completion' is missing"),
        ('{"prompt": "a", "completion": 4}', "'completion' is not text"),
        ('{"question": "a"}', "'text' is missing"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "at least one assistant turn"),
        ('{"text": "half a character: \\ud83d"}', "'text' is not text"),
        ("[" * 100_000, "d.jsonl:2: not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=message):
        read_records(file)


def test_empty_and_limited_files(tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text("\n")
    with pytest.raises(DataError, match="holds no record"):
        read_records(file)
    file.write_text('{"text": "a"}\n{"text": "b"}\n')
    assert read_records(file, 1) == [{"text": "a"}]
    file.write_bytes(b'{"text": "a"}\r\n\r\n{"text": "b"}\r\n{\n\xff\n')
    assert read_records(file, 2) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(DataError, match=r"d\.jsonl:4: not valid JSON(.|\n)*d\.jsonl:5: not UTF-8"):
        read_records(file, 4)
    with pytest.raises(DataError, match=r"gone\.jsonl cannot be read"):
        read_records(tmp_path / "gone.jsonl")


def test_lines_end_at_a_line_feed_alone(tmp_path: Path) -> None:
    texts = ["a\u2028b", "a\u2029b", "a\x85b", "a\x0cb\x0bc\x1cd"]
    file = tmp_path / "d.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_bytes("\ufeff".encode() + "\n".join(lines).encode())
    assert [record["text"] for record in read_records(file)] == texts


def test_the_keys_that_were_checked_are_the_ones_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "2+2=", "completion": "4", "text": null}\n')
    assert tokenizer.decode(encode(read_records(file)[0], tokenizer, 32, "all")[0][0].input_ids) == "2+2=4<|im_end|>"


@pytest.mark.parametrize(
    ("text", "mode", "answer"),
    [
        (" 46\n", "text", "46"),
        ("It is 1,234.50 or 7", "first_number", "1234.5"),
        ("It is 1,234.50 or 7.0", "last_number", "7"),
        ("-0", "first_number", "0"),
        ("-0.0", "first_number", "0"),
        ("12.", "first_number", "12"),
        ("007.10", "first_number", "7.1"),
        ("-12,345,678", "first_number", "-12345678"),
        ("-$5", "first_number", "-5"),
        ("−5", "first_number", "-5"),
        (".5", "first_number", "0.5"),
        ("wait...5", "first_number", "5"),
        ("1,2,3", "first_number", "1"),
        ("1,2,3", "last_number", "3"),
        ("1,2345", "last_number", "2345"),
        ("x2", "first_number", "2"),
        ("GPT-4", "first_number", "4"),
        ("10-5", "last_number", "5"),
        ("10 - -5", "last_number", "-5"),
        ("2024-05-12", "last_number", "12"),
        ("f(3)-4", "last_number", "4"),
        ("none", "first_number", ""),
        ("100", "first_number", "100"),
    ],
)
def test_answers(text: str, mode: Any, answer: str) -> None:
    assert answer_of(text, mode) == answer


def adding(tokenizer: PreTrainedTokenizerFast, form: str) -> PreTrainedTokenizerFast:
    """The tokenizer, with special tokens of its own around a text."""
    changed = copy.deepcopy(tokenizer)
    specials = [("<|im_start|>", 0), ("<|im_end|>", 1)]
    changed.backend_tokenizer.post_processor = processors.TemplateProcessing(single=form, special_tokens=specials)
    return changed


@pytest.mark.parametrize("form", ["$A", "$A <|im_end|>", "<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_one_end_of_sequence_ends_an_example(tokenizer: PreTrainedTokenizerFast, form: str) -> None:
    """Whether the tokenizer, the user or sqft writes it; and a prompt keeps one that the user wrote."""
    adds = adding(tokenizer, form)
    begin = "<|im_start|>" if form.startswith("<") else ""
    for text in ("ab", "ab<|im_end|>"):
        (example,), _ = encode({"text": text}, adds, 32, "completion")
        assert adds.decode(example.input_ids) == f"{begin}ab<|im_end|>"
        (example,), _ = encode({"prompt": text, "completion": "c"}, adds, 32, "completion")
        assert adds.decode(example.input_ids) == f"{begin}{text}c<|im_end|>"
        (example,), _ = encode({"prompt": "c", "completion": text}, adds, 32, "completion")
        assert adds.decode(example.input_ids) == f"{begin}cab<|im_end|>"
        assert prompt_ids({"prompt": "c", "completion": text}, adds)[1] == "ab"  # what a generation can equal


@pytest.mark.parametrize("form", ["$A", "$A <|im_end|>", "<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_an_empty_prompt_starts_from_the_token_that_begins_a_sequence(
    tokenizer: PreTrainedTokenizerFast, form: str
) -> None:
    adds = adding(tokenizer, form)
    record = {"prompt": "", "completion": "4"}
    assert prompt_ids(record, adds)[0] == ([0] if form.startswith("<") else [1])  # no bos is known: the eos
    assert list(encode(record, adds, 32, "completion")[0][0].input_ids[:1]) == prompt_ids(record, adds)[0]
    adds.bos_token = "<|im_start|>"
    assert prompt_ids(record, adds)[0] == [0]
    if form == "$A":
        adds.bos_token = adds.eos_token = None
        assert len(encode({"text": "ab"}, adds, 32, "completion")[0][0].input_ids) == 2
        with pytest.raises(DataError, match=r"^record 1: the prompt is empty"):
            prompts_of([record], adds)


def test_errors_name_the_line_wherever_the_record_went(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    system = [{"role": "system", "content": "be brief"}]
    asked = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]
    records = [{"prompt": "a", "completion": "b"}, {"text": "a"}, {"messages": system + asked}, {"messages": asked[1:]}]
    file = tmp_path / "d.jsonl"
    file.write_text("\n" + "".join(json.dumps(record) + "\n" for record in records))
    fine, text, refused, first = read_records(file)
    strict = copy.deepcopy(tokenizer)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    strict.chat_template = refusal + str(tokenizer.chat_template)
    with pytest.raises(DataError, match=r"d\.jsonl:3: a {text} record has no completion"):
        prompts_of([fine, text], strict)
    for use in (prompts_of, lambda records, tokenizer: encode_all(records, tokenizer, 99, "completion")):
        with pytest.raises(DataError, match=r"d\.jsonl:4: the chat template refuses .*: no system, please"):
            use([refused, fine], strict)
        with pytest.raises(DataError, match=r"d\.jsonl:5: the assistant speaks first"):
            use([first, fine], strict)
        with pytest.raises(DataError, match="record 2: the assistant speaks first"):
            use([fine, dict(first)], strict)
    with pytest.raises(DataError, match=r"d\.jsonl:4: the chat template refuses"):
        text_windows(file, strict, None, 8)


def test_loss_on_all_needs_no_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    """A template may rewrite earlier turns where nobody asks which tokens are the assistant's."""
    rewrites = copy.deepcopy(tokenizer)
    rewrites.chat_template = "{{ messages | length }}" + str(tokenizer.chat_template)
    record = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
    with pytest.raises(DataError, match="record 1: the chat template rewrites earlier turns"):
        encode_all([record], rewrites, 500, "completion")
    (example,), _ = encode(record, rewrites, 500, "all")
    assert example.labels == example.input_ids
