"""A tokenizer of SentencePiece's BPE, read from tokenizer.json, which has merges where llama.cpp wants scores.

SentencePiece joins the two neighbours whose piece has the highest score; tokenizer.json, those of the first merge. Both
are the same where every pair of pieces that makes a piece is a merge, and the merges of one piece follow one another:
then the place of these is the score.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gguf import TokenType

from sqft.api import StageError

SPACE = "▁"
"""What stands for a space in a piece."""
BYTE = re.compile("<0x[0-9A-F]{2}>")
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
PREPEND = {"type": "Prepend", "prepend": SPACE}


def prefix_of(stored: Mapping[str, Any]) -> bool | None:
    """Return whether a space is put before a text, and after each special token; None for a tokenizer of another kind.

    Args:
        stored: the content of tokenizer.json.
    """
    model, normalizer, cutting = stored["model"], stored.get("normalizer"), stored.get("pre_tokenizer")
    plain = not (model.get("dropout") or model.get("continuing_subword_prefix") or model.get("ignore_merges"))
    if model["type"] != "BPE" or not (model.get("byte_fallback") and plain):
        return None
    if normalizer == {"type": "Sequence", "normalizers": [PREPEND, TO_SPACE]} and cutting is None:
        return True
    # Where spaces are replaced first, cutting at spaces cuts nothing.
    at_spaces = cutting is None or (cutting["type"] == "Split" and cutting["pattern"] == {"String": " "})
    if normalizer == TO_SPACE and at_spaces:
        return False
    if normalizer is None and cutting and cutting["type"] == "Metaspace" and not cutting.get("split", True):
        return {"always": True, "never": False}.get(cutting.get("prepend_scheme", "always"))
    return None


def kind_of(token: str, stored: Mapping[str, Any]) -> TokenType:
    """Return what llama.cpp is to take a piece for."""
    if token == stored["model"].get("unk_token"):
        return TokenType.UNKNOWN
    return TokenType.BYTE if BYTE.fullmatch(token) else TokenType.NORMAL


def scores_of(stored: Mapping[str, Any], rows: int) -> list[float]:
    """Return the score of each row's piece: the higher, the earlier it is joined.

    Raises:
        StageError: when no scores join the pieces as the merges do.
    """
    vocab: dict[str, int] = stored["model"]["vocab"]
    merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in stored["model"]["merges"]]
    added = {token["content"] for token in stored["added_tokens"]}  # cut out of a text before any merge
    scores = [0.0] * rows
    joined, last = set[str](), ""
    for place, (left, right) in enumerate(merges):
        piece = left + right
        if piece != last and piece in joined and piece not in added:
            raise StageError(f"export (gguf): the tokenizer's merges of {piece!r} do not follow one another")
        if piece not in joined:
            scores[vocab[piece]] = -1.0 - place
        joined.add(piece)
        last = piece
    known = set(merges)
    for piece in vocab.keys() - added:
        for at in range(1, len(piece)):
            pair = piece[:at], piece[at:]
            if pair[0] in vocab and pair[1] in vocab and pair not in known and not BYTE.fullmatch(piece):
                raise StageError(f"export (gguf): the tokenizer has no merge of {pair[0]!r} and {pair[1]!r}")
    return scores
