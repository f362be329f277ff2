"""Generation: plain and greedy whatever the model brings, and the same for every batch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from sqft.modeling.evaluation import exact_match
from sqft.modeling.evaluation.generation import padding_matters
from sqft.utils.progress import silent

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": SIZES,
    "Mixtral": SIZES | {"num_local_experts": 4},
    "RecurrentGemma": SIZES
    | {"num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32, "attention_window_size": 64},
    "Mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8, "intermediate_size": 64},
    "xLSTM": {"hidden_size": 128, "num_hidden_layers": 2, "num_heads": 4, "num_blocks": 2, "chunk_size": 8},
}
IGNORES_ITS_MASK = {"RecurrentGemma", "xLSTM"}


def tiny(family: str, vocabulary: int) -> Any:
    """A model whose answers depend on every token before."""
    torch.manual_seed(0)
    common = {"vocab_size": vocabulary, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 1}
    config = getattr(transformers, f"{family}Config")(**common, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    return model


PROMPTS = ["1+4=", "20+5000=", "a prompt that is longer than the others: ", "300+4=", "why?", "no", "yes", "20+4="]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_does_not_depend_on_the_batch_size(
    family: str, tokenizer: PreTrainedTokenizerFast, by_hand: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is what decoding by hand says. Prompts of different lengths share a batch unless the mask is ignored."""
    model = tiny(family, len(tokenizer))
    texts = [tokenizer.decode(by_hand(model, prompt)) for prompt in PROMPTS]
    records = [{"prompt": prompt, "completion": "?"} for prompt in PROMPTS]
    generate, sizes = type(model).generate, []

    def counted(self: Any, **arguments: Any) -> Any:
        sizes.append(len(arguments["input_ids"]))
        return generate(self, **arguments)

    monkeypatch.setattr(type(model), "generate", counted)
    for batch_size in (1, 2, 5):
        sizes.clear()
        found = exact_match(model, tokenizer, records, "text", 8, batch_size, silent)
        assert [one["generated"] for one in found["predictions"]] == texts, batch_size
    *probes, batches = sizes[:3], sizes[3:]
    assert probes == [[1, 2, 2]] and max(batches) == (2 if family in IGNORES_ITS_MASK else 5)  # two have four tokens


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_where_padding_matters(family: str, dtype: torch.dtype, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(family, len(tokenizer)).to(dtype)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    with torch.no_grad():
        assert padding_matters(model, 1, prompts) == (family in IGNORES_ITS_MASK)
        assert not padding_matters(model, 1, [[5, 6], [7, 8], []])


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_at_the_right_changes_no_token_before_it(family: str, tokenizer: PreTrainedTokenizerFast) -> None:
    """As in training, where its labels are ignored, and where lm-eval scores a text: a causal model, one with a state
    included, reads from left to right."""
    model = tiny(family, len(tokenizer))
    short, long = [5, 9, 13, 20, 31], list(range(40, 60))
    with torch.no_grad():
        alone = model(torch.tensor([short]), use_cache=False).logits[0]
        padded = model(torch.tensor([short + [1] * 15, long]), use_cache=False).logits[0, :5]
    torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-4)


HOSTILE: list[dict[str, Any]] = [
    {"do_sample": True, "temperature": 9.0, "top_k": 0},
    {"num_beams": 4, "num_return_sequences": 2},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"suppress_tokens": list(range(2, 200))},
    {"bad_words_ids": [[token] for token in range(2, 200)]},
    {"sequence_bias": [[[40], 99.0]]},
    {"forced_eos_token_id": 40},
    {"min_length": 250},
    {"stop_strings": ["a", "b", "c"]},
    {"max_time": 1e-9},
    {"guidance_scale": 9.0},
    {"return_dict_in_generate": True},
]


@pytest.mark.parametrize("brought", HOSTILE, ids=lambda brought: next(iter(brought)))
def test_generation_is_plain_greedy_and_ends_where_the_model_says(
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, by_hand: Any, brought: dict[str, Any]
) -> None:
    """Whatever else the model's folder brings. Its end need not be special to the tokenizer: it is no answer."""
    end = by_hand(talker, PROMPTS[0])[4]
    said = [by_hand(talker, prompt, (1, end)) for prompt in PROMPTS[:2]]
    assert len(said[0]) == 4
    records = [
        {"prompt": p, "completion": tokenizer.decode(tokens)} for p, tokens in zip(PROMPTS[:2], said, strict=True)
    ]
    config = talker.generation_config = GenerationConfig(eos_token_id=end, **brought)
    assert exact_match(talker, tokenizer, records, "text", 8, 64, silent)["accuracy"] == 1
    assert talker.generation_config is config


def test_generation_ends_where_a_turn_of_the_chat_template_ends(
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, by_hand: Any
) -> None:
    """Even if neither the model nor the tokenizer names that token as an end."""
    end = by_hand(talker, PROMPTS[0])[4]
    said = tokenizer.decode(by_hand(talker, PROMPTS[0], (1, end)))
    chats = copy.deepcopy(tokenizer)
    word = chats.convert_ids_to_tokens(end)
    chats.add_tokens([AddedToken(word, special=True, normalized=False)])
    chats.chat_template = (
        "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}" + word + "{% endif %}{% endfor %}"
    )
    record = {"messages": [{"role": "user", "content": PROMPTS[0]}, {"role": "assistant", "content": said}]}
    result = exact_match(talker, chats, [record], "text", 8, 64, silent)
    assert (result["accuracy"], result["predictions"][0]["generated"]) == (1, said)
