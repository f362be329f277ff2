"""The 32-bit words that checkpoints store codes in. No torch."""

WORD_BITS = 32


def fills_words(count: int, bits: int) -> bool:
    """Return whether `count` codes of `bits` bits fill 32-bit words completely, as GPTQ checkpoints need it."""
    return count * bits % WORD_BITS == 0
