"""Loss, perplexity and exact match against slow versions; what measuring leaves untouched."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from sqft.data.chat_tokens import tokens_of
from sqft.data.collators import Collator
from sqft.data.encoding import Prompt, Tokenization
from sqft.data.records import Record
from sqft.data.windows import text_windows
from sqft.errors import DataError, StageError
from sqft.modeling.evaluation import exact_match, example_losses, perplexity, summed_loss
from sqft.modeling.evaluation.measures import _texts
from sqft.modeling.training.loss import CompletionLoss
from sqft.utils.progress import silent
from tests.support.chats import chat_tokenizer

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (1, 20, 300) for b in (4, 5000)]


def test_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    windows = text_windows(data / "heldout.txt", tokenizer, 100, 40)
    total, count, sums = 0.0, 0, [0.0]
    for window in windows:
        probabilities = model(window[None]).logits[0].double().softmax(-1)
        for position in range(len(window) - 1):
            total -= math.log(probabilities[position, window[position + 1]].item())
            count += 1
        sums.append(total)
    found = perplexity(model, windows, silent)
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found["window_tokens"] == [39, 39, 19] and found["stderr"] > 0
    means = [(after - before) / tokens for before, after, tokens in zip(sums, sums[1:], [39, 39, 19], strict=False)]
    assert found["windows"] == pytest.approx(means, rel=1e-5)


def test_a_perplexity_that_is_not_finite_is_refused(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.norm.weight *= 1e6
    with pytest.raises(StageError, match="not finite"):
        perplexity(model, [torch.arange(2, 20)], silent)


def test_a_prompt_beyond_the_window_is_cut_at_the_left(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    """A table of positions has no row for what comes after it."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=24, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config).eval()
    long, cut = ({"prompt": prompt, "completion": "x"} for prompt in ("ab" * 40, "ab" * 10))
    caplog.set_level("WARNING", "sqft")
    for records in ([long, *SUMS], [cut, *SUMS]):
        assert exact_match(model, tokenizer, records, "text", 4, 2, silent)["samples"] == 7
    assert caplog.messages == ["1 of 7 prompts were cut at the left to 20 tokens: the window is 24"]
    with pytest.raises(DataError, match=r"max_new_tokens 24 leaves no room .* window is 24 tokens"):
        exact_match(model, tokenizer, SUMS, "text", 24, 2, silent)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_summed_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_on: str, batch_size: int
) -> None:
    examples = Tokenization(tokenizer, 32, loss_on).encode(SUMS).examples
    total, count = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(example.labels[1:]):
            if label != -100:
                total, count = total - logits[position, label].item(), count + 1
    assert summed_loss(CompletionLoss(model), examples, batch_size, 1, silent) == (
        pytest.approx(total, rel=1e-5),
        count,
    )
    batch = Collator(1)(examples)
    assert CompletionLoss(model)(**batch)["loss"].item() == pytest.approx(total / count, rel=1e-5)
    for chunk in (None, 3):
        single = example_losses(CompletionLoss(model, chunk), examples, batch_size, 1, silent)
        alone = [summed_loss(CompletionLoss(model), [example], 1, 1, silent) for example in examples]
        assert [labels for _, labels in single] == [labels for _, labels in alone]
        assert [loss for loss, _ in single] == pytest.approx([loss for loss, _ in alone], rel=1e-5)


PROMPTS = ["", "1+4=", "20+5000=", "a prompt that is longer than the others: ", "x", "300+4=", "why?", "no"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_exact_match(
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, by_hand: Any, batch_size: int
) -> None:
    """Records are built to match what decoding by hand says, every other one; an empty prompt is among them."""
    said = [by_hand(talker, prompt) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 4 for tokens in said)
    texts = [tokenizer.decode(tokens) + "x" * (i % 2) for i, tokens in enumerate(said)]
    records = [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
    found = exact_match(talker, tokenizer, records, "text", 8, batch_size, silent)
    assert [said["right"] for said in found["predictions"]] == [i % 2 == 0 for i in range(len(PROMPTS))]
    assert found["accuracy"] == 0.5 and found["stderr"] == pytest.approx(math.sqrt(0.25 / (len(PROMPTS) - 1)))


def test_a_prediction_says_what_was_asked_and_answered(
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, by_hand: Any
) -> None:
    generated = tokenizer.decode(by_hand(talker, "20+4="))
    records = [{"prompt": "20+4=", "completion": generated + " !"}, {"prompt": "1+4=", "completion": "5 or 7"}]
    predictions = exact_match(talker, tokenizer, records, "text", 8, 2, silent)["predictions"]
    assert predictions[0] == {
        "record": 1,
        "prompt": "20+4=",
        "generated": generated,
        "answer": generated.strip(),
        "expected": f"{generated} !".strip(),
        "right": False,
    }
    assert exact_match(talker, tokenizer, records, "last_number", 8, 2, silent)["predictions"][1]["expected"] == "7"


def test_a_record_without_a_completion_is_named(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    record = Record(text="a")
    record.location = "test.jsonl:7"
    with pytest.raises(DataError, match=r"test\.jsonl:7: a {text} record"):
        exact_match(model, tokenizer, [*SUMS, record], "text", 5, 2, silent)


MEASURES: list[Callable[[LlamaForCausalLM, PreTrainedTokenizerFast], object]] = [
    lambda model, tokenizer: perplexity(model, [torch.arange(2, 20)], silent),
    lambda model, tokenizer: exact_match(model, tokenizer, SUMS, "text", 2, 4, silent),
    lambda model, tokenizer: summed_loss(
        CompletionLoss(model), Tokenization(tokenizer, 32, "all").encode(SUMS).examples, 4, 1, silent
    ),
]


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("breaks", [False, True])
def test_measuring_leaves_the_model_as_it_was(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, measure: Callable[..., object], breaks: bool
) -> None:
    """In evaluation mode while it is measured, and then each module as it was, after a failure too."""
    model.train()
    model.model.layers[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    config = model.generation_config
    seen: list[bool] = []

    def hook(module: torch.nn.Module, inputs: object, output: object) -> None:
        seen.append(any(part.training for part in model.modules()))
        if breaks:
            raise InterruptedError

    model.lm_head.register_forward_hook(hook)
    with contextlib.suppress(InterruptedError):
        measure(model, tokenizer)
    assert seen and not any(seen)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert model.generation_config is config


def test_an_answer_is_found_where_tags_around_reasoning_are_special_tokens() -> None:
    tokenizer = chat_tokenizer("gptoss")
    generated = "<|channel|>analysis<|message|>2 and 2<|end|><|start|>assistant<|channel|>final<|message|>4"
    shown, said = _texts(tokenizer, tokens_of(tokenizer, generated), Prompt([0], "4", None, "final<|message|>"))
    assert (shown, said) == ("analysis2 and 2assistantfinal4", "4")
