"""A tokenizer as GGUF has it: byte-level BPE, from tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
    last = max([*stored["model"]["vocab"].values(), *(added["id"] for added in stored["added_tokens"])])
    if last >= rows:
        raise StageError(f"export (gguf): {file} has a token {last}, and the embedding {rows} rows")
    tokens = [f"[PAD{row}]" for row in range(rows)]
    kinds = [TokenType.UNUSED] * rows
    for token, row in stored["model"]["vocab"].items():
        tokens[row], kinds[row] = token, TokenType.NORMAL
    for added in stored["added_tokens"]:
        kind = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(how_it_cuts(stored))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    special.add_special_token = _added(folder, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def how_it_cuts(stored: Mapping[str, Any]) -> str:
    """Return llama.cpp's name of the way in which a tokenizer cuts texts.

    Args:
        stored: the content of tokenizer.json.

    Raises:
        StageError: when llama.cpp has no such way that is known here.
    """
    model, cutting = stored["model"], stored["pre_tokenizer"] or {}
    if model["type"] == "BPE" and not model.get("byte_fallback"):
        steps = cutting["pretokenizers"] if cutting.get("type") == "Sequence" else [cutting]
        match [(step.get("type"), step) for step in steps]:
            case [("ByteLevel", {"use_regex": True, "add_prefix_space": False})]:
                return "gpt-2"
            case [
                ("Digits", {"individual_digits": True}),
                ("ByteLevel", {"use_regex": True, "add_prefix_space": False}),
            ]:
                return "smollm"
            case [("Split", {"pattern": {"Regex": pattern}}), ("ByteLevel", {"use_regex": False})] if pattern in SPLITS:
                return SPLITS[pattern]
    raise StageError(
        f"export (gguf): the tokenizer ({model['type']}) cuts texts in a way that is not known here; 'gguf' knows the "
        "byte-level BPE of GPT-2, SmolLM, Llama 3 and Qwen"
    )


def _added(folder: Path, ids: Mapping[str, int]) -> dict[str, bool]:
    """Return whether the tokenizer puts its first and last token around a text, as it does."""
    from tokenizers import Tokenizer

    around = Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a").ids
    return {"bos": around[0] == ids.get("bos"), "eos": len(around) > 1 and around[-1] == ids.get("eos")}
