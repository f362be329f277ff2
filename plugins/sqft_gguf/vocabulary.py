"""A tokenizer as GGUF has it, from tokenizer.json: byte-level BPE, or that of SentencePiece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from sqft.api import StageError
from sqft_gguf import sentencepiece

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST: "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST: "qwen2",
}
"""How a text is cut before it is encoded -> llama.cpp's name for that."""
STRIPS = ("lstrip", "rstrip", "single_word")
"""What an added token may do to the text around it, and llama.cpp does not."""


def add_tokenizer(writer: GGUFWriter, folder: Path, rows: int, kind: str | None = None) -> None:
    """Write the tokenizer of a model's folder.

    Args:
        writer: of the GGUF file.
        folder: of the model.
        rows: of the embedding; rows without a token get one that no text has.
        kind: `model_type` of config.json.

    Raises:
        StageError: when it is of a kind that is not known here.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StageError(f"export (gguf): {folder} has no tokenizer.json, from which the vocabulary is written")
    stored = json.loads(file.read_text("utf-8"))
    check_strips(stored, kind)
    pieces = sentencepiece.prefix_of(stored)
    cutting = how_it_cuts(stored) if pieces is None else "default"
    last = max([*stored["model"]["vocab"].values(), *(added["id"] for added in stored["added_tokens"])])
    if last >= rows:
        raise StageError(f"export (gguf): {file} has a token {last}, and the embedding {rows} rows")
    taken = {*stored["model"]["vocab"], *(added["content"] for added in stored["added_tokens"])}
    tokens = [f"[PAD{row}]" + "_" * (f"[PAD{row}]" in taken) for row in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for token, row in stored["model"]["vocab"].items():
        tokens[row], kinds[row] = token, TokenType.NORMAL if pieces is None else sentencepiece.kind_of(token, stored)
    for added in stored["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        text = added["content"]
        tokens[added["id"]] = text if pieces is None else text.replace(sentencepiece.SPACE, " ")
        kinds[added["id"]] = TokenType.UNKNOWN if text == stored["model"].get("unk_token") else kind
    writer.add_tokenizer_model("gpt2" if pieces is None else "llama")
    writer.add_tokenizer_pre(cutting)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if pieces is not None:
        writer.add_token_scores(sentencepiece.scores_of(stored, rows))
        writer.add_add_space_prefix(pieces)
    special = SpecialVocab(folder, load_merges=pieces is None, n_vocab=rows)
    special.add_special_token = _added(folder, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def check_strips(stored: Mapping[str, Any], kind: str | None) -> None:
    """Check that no added token changes the text around it in a way that llama.cpp does not: in models of
    Phi-3 (by their `model_type`) it strips spaces after special tokens.

    Raises:
        StageError: naming a token that does.
    """
    prepends = sentencepiece.PREPEND in (stored.get("normalizer") or {}).get("normalizers", ())
    for added in stored.get("added_tokens", ()):
        right = kind == "phi3" and added["content"] not in ("<unk>", "<s>", "<|endoftext|>")
        if any(bool(added.get(how)) != (how == "rstrip" and right) for how in STRIPS):
            raise StageError(
                f"export (gguf): the token {added['content']!r} changes the text around it ({', '.join(STRIPS)}) in "
                "another way than in llama.cpp"
            )
        if prepends and added.get("normalized"):  # a space is put before it, so that it is found in no text
            raise StageError(
                f"export (gguf): the token {added['content']!r} is found in other texts than in llama.cpp; set its "
                "normalized to false in tokenizer.json"
            )


def refusal_of_tokenizer(path: Path, kind: str | None = None) -> str | None:
    """Return why the tokenizer of a model's folder cannot be written; None when it can, or nothing is known of it."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        stored = json.loads(file.read_text("utf-8"))
        check_strips(stored, kind)
        if sentencepiece.prefix_of(stored) is None:
            how_it_cuts(stored)
        else:
            sentencepiece.scores_of(stored, 1 + max(stored["model"]["vocab"].values()))
    except StageError as error:
        return str(error)
    except (ValueError, KeyError, TypeError):  # whoever loads it says what is wrong with it
        return None
    return None


def how_it_cuts(stored: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way in which a tokenizer cuts texts.

    Args:
        stored: the content of tokenizer.json.

    Raises:
        StageError: when llama.cpp has no such way that is known here.
    """
    model, cutting = stored["model"], stored["pre_tokenizer"] or {}
    normalizer = (stored.get("normalizer") or {}).get("type")
    if model["type"] == "BPE" and not model.get("byte_fallback") and normalizer in (None, "NFC"):
        steps = cutting["pretokenizers"] if cutting.get("type") == "Sequence" else [cutting]
        match [(step.get("type"), {"use_regex": True, **step}) for step in steps]:
            case [("ByteLevel", {"use_regex": True, "add_prefix_space": False})]:
                return "gpt-2"
            case [
                ("Digits", {"individual_digits": True}),
                ("ByteLevel", {"use_regex": True, "add_prefix_space": False}),
            ]:
                return "smollm"
            case [
                ("Split", {"pattern": {"Regex": pattern}, "behavior": "Isolated"}),
                ("ByteLevel", {"use_regex": False, "add_prefix_space": False}),
            ] if pattern in SPLITS and model.get("ignore_merges", False) == (SPLITS[pattern] == "llama-bpe"):
                return SPLITS[pattern]
    raise StageError(
        f"export (gguf): the tokenizer ({model['type']}) cuts texts in a way that is not known here; 'gguf' knows the "
        "byte-level BPE of GPT-2, SmolLM, Llama 3 and Qwen, and SentencePiece's of Llama 2 and Gemma"
    )


def _added(folder: Path, ids: Mapping[str, int]) -> dict[str, bool]:
    """Return whether the tokenizer puts its first and last token around a text, as it does.

    Raises:
        StageError: when it puts others there.
    """
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    around, inside = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    for begins, ends in product((False, True), repeat=2):
        if around == [ids.get("bos")] * begins + inside + [ids.get("eos")] * ends:
            return {"bos": begins, "eos": ends}
    raise StageError("export (gguf): the tokenizer puts tokens around a text that are not its first and its last one")
