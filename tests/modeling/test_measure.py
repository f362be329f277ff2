"""Perplexity, mean loss and exact match against slow versions."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from sqft.data.batches import text_windows
from sqft.data.prompts import encode
from sqft.modeling.measure import exact_match, mean_loss, perplexity
from sqft.progress import silent

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


def test_mean_loss(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    examples = [encode(record, tokenizer, 32, "completion")[0] for record in SUMS]
    total, count = 0.0, 0
    for example in examples:
        logits = model(torch.tensor([example.input_ids])).logits[0].double().log_softmax(-1)
        for position, label in enumerate(example.labels[1:]):
            if label != -100:
                total, count = total - logits[position, label].item(), count + 1
    assert mean_loss(model, examples, 4, 1, silent) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    """Records are built to match what one-at-a-time decoding by hand says, every other one."""
    records: list[dict[str, Any]] = []
    for index, record in enumerate(SUMS):
        ids = tokenizer(record["prompt"])["input_ids"]
        for _ in range(5):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == 1:
                break
        text = tokenizer.decode(ids[len(tokenizer(record["prompt"])["input_ids"]) :], skip_special_tokens=True)
        records.append({"prompt": record["prompt"], "completion": text if index % 2 else text + "x"})
    found = exact_match(model, tokenizer, records, "text", 5, batch_size, silent)
    assert found["outcomes"] == [bool(i % 2) and record["completion"].strip() != "" for i, record in enumerate(records)]
    p = found["accuracy"]
    assert found["stderr"] == pytest.approx(math.sqrt(p * (1 - p) / (len(records) - 1)))
