"""Loss, perplexity, exact match and lm-eval's tasks against slow versions; what measuring leaves untouched."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedTokenizerFast

from sqft.data.collators import Collator
from sqft.data.encoding import Tokenization
from sqft.data.records import Record
from sqft.data.windows import text_windows
from sqft.errors import DataError, StageError
from sqft.modeling.evaluation import exact_match, lm_eval_tasks, mean_loss, perplexity
from sqft.modeling.training.loss import CompletionLoss
from sqft.utils.progress import silent

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (1, 20, 300) for b in (4, 5000)]


def test_perplexity(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, data: Path) -> None:
    windows = text_windows(data / "heldout.txt", tokenizer, 100, 40)
    total, count = 0.0, 0
    for window in windows:
        probabilities = model(window[None]).logits[0].double().softmax(-1)
        for position in range(len(window) - 1):
            total -= math.log(probabilities[position, window[position + 1]].item())
            count += 1
    found = perplexity(model, windows, silent)
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)


def test_a_perplexity_that_is_not_finite_is_refused(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        model.model.norm.weight *= 1e6
    with pytest.raises(StageError, match="not finite"):
        perplexity(model, [torch.arange(2, 20)], silent)


def write_tasks(folder: Path, documents: list[dict[str, Any]]) -> None:
    """`toy_choose` and `toy_say`, of documents with a question, an answer and the index of a choice."""
    (folder / "d.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    source = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'd.jsonl'}\ntest_split: test\n"
    (folder / "choose.yaml").write_text(
        f"task: toy_choose\n{source}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: i\n"
        "doc_to_choice: ['1', '2']\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
        "  - {metric: acc_norm, aggregation: median, higher_is_better: true}\n"
    )
    (folder / "say.yaml").write_text(
        f"task: toy_say\n{source}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: '{{{{a}}}}'\n"
        "generation_kwargs: {until: ['<|im_end|>'], max_gen_toks: 4}\n"
        "filter_list:\n  - {name: strict, filter: [{function: take_first}]}\n"
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tasks", [[], ["toy_choose"], ["toy_say"]], ids=str)
def test_answers_of_logits_that_are_not_finite_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, tasks: list[str], bad: float
) -> None:
    """Even for one record of a batch; they would count as wrong answers."""
    write_tasks(tmp_path, [{"q": f"{n}+1=", "a": "2", "i": 0} for n in range(4)])

    def spoil(_: Any, __: Any, output: Any) -> None:
        output.logits[-1, -1, 7] = bad

    model.register_forward_hook(spoil)
    with pytest.raises(StageError, match="logits are not finite"):
        if tasks:
            lm_eval_tasks(model, tokenizer, tasks, tmp_path, None, 2)
        else:
            exact_match(model, tokenizer, SUMS, "text", 4, 3, silent)
    assert len(model._forward_hooks) == 1


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
def test_mean_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_on: str, batch_size: int) -> None:
    examples = Tokenization(tokenizer, 32, loss_on).encode(SUMS).examples
    total, count = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(example.labels[1:]):
            if label != -100:
                total, count = total - logits[position, label].item(), count + 1
    assert mean_loss(model, examples, batch_size, 1, silent) == pytest.approx(total / count, rel=1e-5)
    batch = Collator(1)(examples)
    assert CompletionLoss(model)(**batch)["loss"].item() == pytest.approx(total / count, rel=1e-5)


@pytest.fixture
def talker(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Weights large enough that what it says depends on every token before, and on where it stands."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return model


def by_hand(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, ends: Sequence[int] = (1,), steps: int = 8
) -> list[int]:
    """Greedy decoding, one whole forward pass a step, no padding and no cache."""
    start = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
    ids: list[int] = []
    for _ in range(steps):
        token = int(model(torch.tensor([start + ids])).logits[0, -1].argmax())
        if token in ends:
            break
        ids.append(token)
    return ids


PROMPTS = ["", "1+4=", "20+5000=", "a prompt that is longer than the others: ", "x", "300+4=", "why?", "no"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_exact_match(talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    """Records are built to match what decoding by hand says, every other one; an empty prompt is among them."""
    said = [by_hand(talker, tokenizer, prompt) for prompt in PROMPTS]
    assert all(len(set(tokens)) > 4 for tokens in said)
    texts = [tokenizer.decode(tokens) + "x" * (i % 2) for i, tokens in enumerate(said)]
    records = [{"prompt": prompt, "completion": text} for prompt, text in zip(PROMPTS, texts, strict=True)]
    found = exact_match(talker, tokenizer, records, "text", 8, batch_size, silent)
    assert found["outcomes"] == [i % 2 == 0 for i in range(len(PROMPTS))]
    assert found["accuracy"] == 0.5 and found["stderr"] == pytest.approx(math.sqrt(0.25 / (len(PROMPTS) - 1)))


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
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, brought: dict[str, Any]
) -> None:
    """Whatever else the model's folder brings. Its end need not be special to the tokenizer: it is no answer."""
    end = by_hand(talker, tokenizer, PROMPTS[1])[4]
    said = [by_hand(talker, tokenizer, prompt, (1, end)) for prompt in PROMPTS[1:3]]
    assert len(said[0]) == 4
    records = [
        {"prompt": p, "completion": tokenizer.decode(tokens)} for p, tokens in zip(PROMPTS[1:3], said, strict=True)
    ]
    config = talker.generation_config = GenerationConfig(eos_token_id=end, **brought)
    assert exact_match(talker, tokenizer, records, "text", 8, 64, silent)["accuracy"] == 1
    assert talker.generation_config is config


def test_a_record_without_a_completion_is_named(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    record = Record(text="a")
    record.location = "test.jsonl:7"
    with pytest.raises(DataError, match=r"test\.jsonl:7: a {text} record"):
        exact_match(model, tokenizer, [*SUMS, record], "text", 5, 2, silent)


MEASURES: list[Callable[[LlamaForCausalLM, PreTrainedTokenizerFast], object]] = [
    lambda model, tokenizer: perplexity(model, [torch.arange(2, 20)], silent),
    lambda model, tokenizer: exact_match(model, tokenizer, SUMS, "text", 2, 4, silent),
    lambda model, tokenizer: mean_loss(model, Tokenization(tokenizer, 32, "all").encode(SUMS).examples, 4, 1, silent),
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


def test_lm_eval_gives_metrics_and_leaves_no_trace(
    talker: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"{n}+1=" for n in range(4)]
    documents = [
        {"q": p, "a": tokenizer.decode(by_hand(talker, tokenizer, p, steps=4)), "i": n % 2}
        for n, p in enumerate(prompts)
    ]
    write_tasks(tmp_path, documents)
    talker.train()
    config = talker.generation_config = GenerationConfig(eos_token_id=1, repetition_penalty=5.0, do_sample=True)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    surroundings = os.environ.get("DISABLE_MULTIPROC"), logging.getLogger("lm_eval.models.huggingface").level
    found = lm_eval_tasks(talker, tokenizer, ["toy_choose", "toy_say"], tmp_path, None, 2)
    assert list(found["toy_choose"]) == ["acc", "acc_stderr", "acc_norm", "acc_norm_stderr"]
    assert found["toy_say"] == {"exact_match,strict": 1.0, "exact_match,strict_stderr": 0.0}
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert surroundings == (os.environ.get("DISABLE_MULTIPROC"), logging.getLogger("lm_eval.models.huggingface").level)
    assert talker.generation_config is config and talker.training
    out, err = capfd.readouterr()
    assert out == "" and "pretrained" not in err
