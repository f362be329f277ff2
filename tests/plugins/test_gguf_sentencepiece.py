"""SentencePiece's tokenizers in GGUF: scores that join pieces as merges do, and what has no scores."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqft_gguf import sentencepiece, vocabulary
from sqft_gguf.sentencepiece import prefix_of, scores_of
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from sqft.api import StageError
from tests.support.sentencepiece_bpe import LETTERS, sentencepiece_bpe


def stored(gemma: bool = False, **model: Any) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(sentencepiece_bpe(gemma).to_str())
    read["model"] |= model
    return read


def joined_by_scores(text: str, vocab: dict[str, int], scores: list[float]) -> list[str]:
    """What SentencePiece does: of all neighbours whose piece is known, join those of the highest score, the first of
    equals, until there are none."""
    pieces = list(text)
    while True:
        pairs = [(-scores[vocab[a + b]], at) for at, (a, b) in enumerate(pairwise(pieces)) if a + b in vocab]
        if not pairs:
            return pieces
        _, at = min(pairs)
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("▁theiquckbroxvwnjmps15an"), min_size=1, max_size=24))
def test_scores_join_what_merges_join(text: str) -> None:
    read = stored()
    scores = scores_of(read, len(read["model"]["vocab"]))
    found = [token.value for token in sentencepiece_bpe(True).model.tokenize(text)]
    assert found == joined_by_scores(text, read["model"]["vocab"], scores)


def test_merges_that_no_scores_stand_for() -> None:
    merges = stored()["model"]["merges"]
    rows = len(stored()["model"]["vocab"])
    last = next(merge for merge in reversed(merges) if "".join(merge) == "ver")
    with pytest.raises(StageError, match=r"merges of 'ver' do not follow one another"):
        scores_of(stored(merges=[merge for merge in merges if merge != last] + [last]), rows)
    with pytest.raises(StageError, match=r"has no merge of"):
        scores_of(stored(merges=[merge for merge in merges if merge != last]), rows)
    assert scores_of(stored(merges=[" ".join(merge) for merge in merges]), rows) == scores_of(stored(), rows)


METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": False}


@pytest.mark.parametrize(
    ("changes", "prefix"),
    [
        ({}, True),
        ({"normalizer": None, "pre_tokenizer": METASPACE}, True),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "never"}}, False),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "prepend_scheme": "first"}}, None),
        ({"normalizer": None, "pre_tokenizer": {**METASPACE, "split": True}}, None),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"normalizer": None}, None),
        ({"pre_tokenizer": {"type": "Digits"}}, None),
    ],
)
def test_what_a_tokenizer_puts_before_a_text(changes: dict[str, Any], prefix: bool | None) -> None:
    assert prefix_of(stored() | changes) is prefix
    assert prefix_of(stored(gemma=True)) is False
    assert prefix_of(stored(byte_fallback=False)) is None and prefix_of(stored(type="Unigram")) is None


def test_the_vocabulary(tmp_path: Path) -> None:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece_bpe(True, ["\n\n", "▁▁"]), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(tmp_path)
    rows = len(tokenizer) + 2
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "gemma3")
    vocabulary.add_tokenizer(writer, tmp_path, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "v.gguf").fields.items()}
    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    kind = dict(zip(tokens, map(gguf.TokenType, kinds), strict=True))
    assert fields["tokenizer.ggml.model"] == "llama" and fields["tokenizer.ggml.add_space_prefix"] is False
    assert fields["tokenizer.ggml.add_bos_token"] is True and len(fields["tokenizer.ggml.scores"]) == rows
    expected = {"<unk>": "UNKNOWN", "<s>": "CONTROL", "<0x0A>": "BYTE", "▁the": "NORMAL", "\n\n": "USER_DEFINED",
                "  ": "USER_DEFINED", f"[PAD{rows - 1}]": "UNUSED"}  # fmt: skip
    assert {token: kind[token].name for token in expected} == expected
    assert "tokenizer.ggml.merges" not in fields and LETTERS[1] in kind


@pytest.mark.parametrize(
    ("content", "options", "phi3", "bad"),
    [
        ("<|end|>", {"rstrip": True}, True, False),
        ("<|end|>", {"rstrip": True}, False, True),
        ("<|end|>", {}, True, True),
        ("<|endoftext|>", {}, True, False),
        ("<|endoftext|>", {"lstrip": True}, True, True),
        ("<|end|>", {"single_word": True}, False, True),
        ("<think>", {"special": False, "normalized": False}, True, True),
        ("<think>", {"special": False, "normalized": False, "rstrip": True}, True, False),
        ("<think>", {"special": False, "normalized": True}, False, True),
    ],
)
def test_tokens_that_change_the_text_around_them(content: str, options: Any, phi3: bool, bad: bool) -> None:
    made, kind = sentencepiece_bpe(False), "phi3" if phi3 else "llama"
    made.add_tokens([AddedToken(content, **{"special": True, "normalized": False} | options)])
    read = json.loads(made.to_str())
    read["added_tokens"] = [added for added in read["added_tokens"] if added["content"] == content]
    if bad:
        with pytest.raises(StageError, match=r"changes the text around it|found in other texts"):
            vocabulary.check_strips(read, kind)
    else:
        vocabulary.check_strips(read, kind)
    assert sentencepiece.kind_of("<0xA0>", read) == gguf.TokenType.BYTE
