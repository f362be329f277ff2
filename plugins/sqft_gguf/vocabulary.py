"""A tokenizer as GGUF has it: byte-level BPE, from tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType

from sqft.api import StageError

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS = {
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + REST: "llama-bpe",
    CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + REST: "qwen2",
}
"""How a text is cut before it is encoded -> llama.cpp's name for that."""
STRIPS = ("lstrip", "rstrip", "single_word")
"""What an added token may do to the text around it, and llama.cpp does not."""


def add_tokenizer(writer: GGUFWriter, folder: Path, rows: int) -> None:
    """Write the tokenizer of a model's folder.

    Args:
        writer: of the GGUF file.
        folder: of the model.
        rows: of the embedding; rows without a token get one that no text has.

    Raises:
        StageError: when it is of a kind that is not known here.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise StageError(f"export (gguf): {folder} has no tokenizer.json, from which the vocabulary is written")
    stored = json.loads(file.read_text("utf-8"))
    cutting = how_it_cuts(stored)
    last = max([*stored["model"]["vocab"].values(), *(added["id"] for added in stored["added_tokens"])])
    if last >= rows:
        raise StageError(f"export (gguf): {file} has a token {last}, and the embedding {rows} rows")
    taken = {*stored["model"]["vocab"], *(added["content"] for added in stored["added_tokens"])}
    tokens = [f"[PAD{row}]" + "_" * (f"[PAD{row}]" in taken) for row in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for token, row in stored["model"]["vocab"].items():
        tokens[row], kinds[row] = token, TokenType.NORMAL
    for added in stored["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(cutting)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    special.add_special_token = _added(folder, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def refusal_of_tokenizer(path: Path) -> str | None:
    """Return why the tokenizer of a model's folder cannot be written; None when it can, or nothing is known of it."""
    file = path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        how_it_cuts(json.loads(file.read_text("utf-8")))
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
    strips = any(added.get(how) for added in stored.get("added_tokens", ()) for how in STRIPS)
    if model["type"] == "BPE" and not model.get("byte_fallback") and normalizer in (None, "NFC") and not strips:
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
        "byte-level BPE of GPT-2, SmolLM, Llama 3 and Qwen"
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
