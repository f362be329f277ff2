"""Records become the tokens they should, with the labels they should."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sqft.data.encoding import IGNORED, Tokenization, encode_prompt, encode_prompts
from sqft.data.records import read_records
from sqft.data.windows import text_windows
from sqft.errors import DataError


def test_completion_carries_the_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = Tokenization(tokenizer, 32, "completion").encode_record({"prompt": "2+2=", "completion": "4"})
    assert (example.cut, example.answers, example.ends) == (0, 1, (tokenizer.eos_token_id,))
    assert tokenizer.decode(example.input_ids) == "2+2=4<|im_end|>"
    assert [label for label in example.labels if label != IGNORED] == list(example.input_ids[-2:])
    assert encode_prompt({"prompt": "2+2=", "completion": "4"}, tokenizer)[:3] == (
        list(example.input_ids[:-2]),
        "4",
        None,
    )
    (everything,) = Tokenization(tokenizer, 32, "all").encode_record({"prompt": "2+2=", "completion": "4"})
    assert everything.labels == everything.input_ids


def test_long_prompts_lose_their_start(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = Tokenization(tokenizer, 8, "completion").encode_record({"prompt": "abcdefghij", "completion": "XY"})
    assert example.cut == 5 and tokenizer.decode(example.input_ids) == "fghijXY<|im_end|>"
    (example,) = Tokenization(tokenizer, 8, "completion").encode_record({"prompt": "ab", "completion": "0123456789"})
    assert tokenizer.decode(example.input_ids) == "b0123456"
    assert (example.cut, example.answers, example.ends) == (5, 1, ())  # the end was cut off with the rest
    (example,) = Tokenization(tokenizer, 8, "all").encode_record({"prompt": "abcdefghij", "completion": "XY"})
    assert tokenizer.decode(example.input_ids) == "fghijXY<|im_end|>" and example.labels == example.input_ids
    records = [{"prompt": "a", "completion": "b"}, {"prompt": "abcdefghij", "completion": "XY"}]
    encoded = Tokenization(tokenizer, 8, "completion").encode(records)
    assert (encoded.truncated, encoded.tokens_cut) == (1, 5)


LENGTH = 8


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("truncation", ["right", "drop"])
def test_long_examples_lose_their_end_or_are_left_out(
    tokenizer: PreTrainedTokenizerFast, truncation: str, loss_on: str
) -> None:
    """Every length of prompt and of completion, against lists of characters: each is a token."""
    records, expected, cut = [], [], []
    for first, second in itertools.product(range(1, 12), repeat=2):
        prompt, completion = "abcdefghijk"[:first], "01234567890"[:second]
        whole = [*prompt, *completion, "<|im_end|>"]
        learnt = [loss_on == "all"] * first + [True] * (second + 1)
        records.append({"prompt": prompt, "completion": completion})
        if len(whole) <= LENGTH or (truncation == "right" and any(learnt[1:LENGTH])):
            expected.append((whole[:LENGTH], learnt[:LENGTH]))
            cut.append(max(0, len(whole) - LENGTH))
    encoded = Tokenization(tokenizer, LENGTH, loss_on, truncation).encode(records)
    for example, (tokens, learnt) in zip(encoded.examples, expected, strict=True):
        assert tokenizer.convert_ids_to_tokens(example.input_ids) == tokens
        assert [label != IGNORED for label in example.labels] == learnt
        answers = int(any(token.isdigit() for token in tokens))
        assert (example.answers, example.lost) == (answers, 1 - answers)
        assert len(example.ends) == tokens.count("<|im_end|>")
    assert encoded.dropped == len(records) - len(expected) and sum(encoded.sizes) == len(expected)
    assert [example.cut for example in encoded.examples] == cut
    assert (encoded.truncated, encoded.tokens_cut) == (sum(map(bool, cut)), sum(cut))
    assert encoded.records == len(records) and (encoded.dropped > 0) == ((truncation, loss_on) != ("right", "all"))


@pytest.mark.parametrize("truncation", ["right", "drop"])
def test_data_of_which_nothing_is_left(tokenizer: PreTrainedTokenizerFast, truncation: str) -> None:
    long = [{"prompt": "abcdefgh", "completion": "1"}] * 3
    with pytest.raises(DataError, match=f'^all 3 examples are longer than max_length .8 tokens.*"{truncation}"'):
        Tokenization(tokenizer, 8, "completion", truncation).encode(long)
    assert Tokenization(tokenizer, 8, "completion").encode(long).truncated == 3
    with pytest.raises(DataError, match=r"^record 1: there is no token to learn from"):  # the cut is not to blame
        Tokenization(tokenizer, 8, "completion", truncation).encode([{"prompt": "abcdefghi", "completion": ""}, *long])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("abcdefghij", ["abcd", "efgh", "ij<|im_end|>"]),  # ends where the text ends, and nowhere else
        ("abcd", ["abcd"]),  # an end alone has nothing to be learnt from
        ("ab", ["ab<|im_end|>"]),
    ],
)
@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("truncation", ["left", "right", "drop"])
def test_a_long_text_is_several_examples(
    tokenizer: PreTrainedTokenizerFast, text: str, expected: list[str], loss_on: str, truncation: str
) -> None:
    encoded = Tokenization(tokenizer, 4, loss_on, truncation).encode([{"text": text}])
    assert [tokenizer.decode(example.input_ids) for example in encoded.examples] == expected
    assert all(example.labels == example.input_ids for example in encoded.examples)
    assert (encoded.truncated, encoded.tokens_cut, encoded.dropped) == (0, 0, 0)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_long_conversations_keep_their_last_answer(tokenizer: PreTrainedTokenizerFast, loss_on: str) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = Tokenization(tokenizer, 20, loss_on).encode_record(record)
    assert tokenizer.decode(example.input_ids).endswith("|>assistant\nno<|im_end|>")
    (example,) = Tokenization(tokenizer, 3, "completion").encode_record(record)
    assert tokenizer.decode(example.input_ids) == "\nno" and example.labels[1:] == example.input_ids[1:]


def test_only_the_assistants_turns_carry_loss(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]
    record = {"messages": [{"role": role, "content": content} for role, content in turns]}
    (example,) = Tokenization(tokenizer, 500, "completion").encode_record(record)
    kept = [label for label in example.labels if label != IGNORED]
    assert tokenizer.decode(kept) == "yes<|im_end|>no<|im_end|>"
    ids, reference, end, *_ = encode_prompt(record, tokenizer)
    assert (reference, end) == ("no", tokenizer.eos_token_id) and tokenizer.decode(ids).endswith(
        "<|im_start|>assistant\n"
    )


def test_text_and_nothing_to_learn(tokenizer: PreTrainedTokenizerFast) -> None:
    (example,) = Tokenization(tokenizer, 8, "completion").encode_record({"text": "ab"})
    assert example.labels == example.input_ids and len(example.labels) == 3
    with pytest.raises(DataError, match=r"^record 1: there is no token to learn from"):
        Tokenization(tokenizer, 8, "completion").encode([{"prompt": "a", "completion": ""}])
    with pytest.raises(DataError, match="no completion"):
        encode_prompt({"text": "a"}, tokenizer)


def test_the_keys_that_were_checked_are_the_ones_used(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    file = tmp_path / "d.jsonl"
    file.write_text('{"prompt": "2+2=", "completion": "4", "text": null}\n')
    assert (
        tokenizer.decode(Tokenization(tokenizer, 32, "all").encode_record(read_records(file)[0])[0].input_ids)
        == "2+2=4<|im_end|>"
    )


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
        (example,) = Tokenization(adds, 32, "completion").encode_record({"text": text})
        assert adds.decode(example.input_ids) == f"{begin}ab<|im_end|>"
        (example,) = Tokenization(adds, 32, "completion").encode_record({"prompt": text, "completion": "c"})
        assert adds.decode(example.input_ids) == f"{begin}{text}c<|im_end|>"
        (example,) = Tokenization(adds, 32, "completion").encode_record({"prompt": "c", "completion": text})
        assert adds.decode(example.input_ids) == f"{begin}cab<|im_end|>"
        assert encode_prompt({"prompt": "c", "completion": text}, adds)[1] == "ab"  # what a generation can equal


@pytest.mark.parametrize("form", ["$A", "$A <|im_end|>", "<|im_start|> $A", "<|im_start|> $A <|im_end|>"])
def test_an_empty_prompt_starts_from_the_token_that_begins_a_sequence(
    tokenizer: PreTrainedTokenizerFast, form: str
) -> None:
    adds = adding(tokenizer, form)
    record = {"prompt": "", "completion": "4"}
    assert encode_prompt(record, adds)[0] == ([0] if form.startswith("<") else [1])  # no bos is known: the eos
    assert (
        list(Tokenization(adds, 32, "completion").encode_record(record)[0].input_ids[:1])
        == encode_prompt(record, adds)[0]
    )
    adds.bos_token = "<|im_start|>"
    assert encode_prompt(record, adds)[0] == [0]
    if form == "$A":
        adds.bos_token = adds.eos_token = None
        assert len(Tokenization(adds, 32, "completion").encode_record({"text": "ab"})[0].input_ids) == 2
        with pytest.raises(DataError, match=r"^record 1: the prompt is empty"):
            encode_prompts([record], adds)


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
        encode_prompts([fine, text], strict)
    for use in (encode_prompts, lambda records, tokenizer: Tokenization(tokenizer, 99, "completion").encode(records)):
        with pytest.raises(DataError, match=r"d\.jsonl:4: the chat template rejects .*: no system, please"):
            use([refused, fine], strict)
        with pytest.raises(DataError, match=r"d\.jsonl:5: the conversation begins with an assistant turn"):
            use([first, fine], strict)
        with pytest.raises(DataError, match="record 2: the conversation begins with an assistant turn"):
            use([fine, dict(first)], strict)
    with pytest.raises(DataError, match=r"d\.jsonl:4: the chat template rejects"):
        text_windows(file, strict, None, 8)
