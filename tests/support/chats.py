"""A byte-level tokenizer with the special tokens of many families, for their chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sqft.data.encoding import IGNORED, Example

TEMPLATES = Path(__file__).parents[1] / "data" / "chat_templates"

SPECIALS = [
    "<bos>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
    "[gMASK]",
    "<sop>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|START_RESPONSE|>",
    "<|END_RESPONSE|>",
    "<|CHATBOT_TOKEN|>",
    "<|USER_TOKEN|>",
]

ENDS = {
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "glm4moe": "<|endoftext|>",
    "gptoss": "<|return|>",
    "phi3_5": "<|endoftext|>",
    "gemma_like": "<end_of_turn>",
    "llama3_like": "<|eot_id|>",
    "mistral_like": "</s>",
    "cohere_like": "<|END_OF_TURN_TOKEN|>",
}
"""The end of sequence of each family; of the others it is "<|im_end|>"."""


@cache
def chat_tokenizer(template: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes with the chat template of a name. Two line breaks are one token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*alphabet, "ĊĊ"])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+|[^\n]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=ENDS.get(template, "<|im_end|>"), bos_token="<bos>"
    )
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    thought = [AddedToken(token, special=False, normalized=False) for token in ("<think>", "</think>")]
    tokenizer.add_tokens(thought)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text("utf-8").removesuffix("\n")
    return tokenizer


def conversation(*turns: tuple[str, str], **fields: Any) -> dict[str, Any]:
    """Return a record of (role, content) turns, with fields beside them."""
    return {"messages": [{"role": role, "content": content} for role, content in turns], **fields}


def shown(tokenizer: PreTrainedTokenizerFast, example: Example) -> str:
    """Return an example as text, what is learnt between ⟪ and ⟫."""
    text, learning = "", False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if (label != IGNORED) != learning:
            text += "⟫" if learning else "⟪"
            learning = not learning
        text += tokenizer.decode([token])
    return text + "⟫" * learning


def all_shown(tokenizer: PreTrainedTokenizerFast, examples: Sequence[Example]) -> list[str]:
    """Return examples as texts."""
    return [shown(tokenizer, example) for example in examples]
