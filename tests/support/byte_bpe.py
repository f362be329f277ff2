"""Byte-level BPE with merges, as large models have it."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers


def byte_level_bpe(texts: Sequence[str], size: int, specials: Sequence[str]) -> Tokenizer:
    """Learn at most `size` tokens from some texts; the special ones come first."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=list(specials), initial_alphabet=alphabet)
    made.train_from_iterator(texts, trainer)
    return made
