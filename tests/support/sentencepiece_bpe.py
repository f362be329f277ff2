"""A small tokenizer of SentencePiece's BPE as tokenizer.json has it: with every merge that makes a piece."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPACE = "▁"
PIECES = (
    "▁t", "he", "▁the", "th", "in", "er", "an", "▁qu", "ick", "ic", "ck", "▁b", "ox", "▁▁", "▁▁▁", "qu", "ui", "um",
    "▁o", "ve", "ver", "ro", "row", "wn", "▁j", "mp", "ump", "▁box", "es", "st", "1", "15", "▁1", "▁15", "uick",
    "▁quick",
)  # fmt: skip
LETTERS = SPACE + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?-'"


def sentencepiece_bpe(gemma: bool, added: Sequence[str | AddedToken] = ()) -> Tokenizer:
    """Return a tokenizer with bytes for what it has no piece for, which puts <s> before a text.

    Args:
        gemma: whether it is like Gemma's, which puts no space before a text; else it is like Llama 2's.
        added: tokens that are cut out of a text first; <unk>, <s> and </s> are too, as special ones unless given here.
    """
    single = [letter for letter in LETTERS if letter not in PIECES]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES, *single]
    known = set(vocab)
    merges = [
        (piece[:at], piece[at:])
        for piece in PIECES
        for at in range(1, len(piece))
        if piece[:at] in known and piece[at:] in known
    ]
    model = models.BPE(
        vocab={piece: row for row, piece in enumerate(vocab)}, merges=merges, unk_token="<unk>", byte_fallback=True,
        fuse_unk=True,
    )  # fmt: skip
    made = Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    if gemma:
        made.normalizer = replace
        made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        made.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    made.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made.add_tokens(list(added))
    made.add_special_tokens([token for token in ("<unk>", "<s>", "</s>") if token not in map(str, added)])
    return made
