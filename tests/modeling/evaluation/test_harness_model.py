"""A model as lm-eval sees it: what it says hangs on no batch, and its progress is shown."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from multimodal_models import FAMILIES, make
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast, RecurrentGemmaConfig

from sqft.modeling.evaluation.harness import TaskSettings, lm_eval_tasks
from sqft.utils.progress import silent

WriteTasks = Callable[[list[dict[str, Any]]], Path]


def test_answers_and_scores_do_not_depend_on_the_batch_size(
    tokenizer: PreTrainedTokenizerFast, by_hand: Any, write_tasks: WriteTasks
) -> None:
    """Where the model ignores its mask, too: what is said is what decoding by hand says."""
    config = RecurrentGemmaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        lru_width=32,
        attention_window_size=64,
        pad_token_id=1,
        bos_token_id=1,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
    questions = ["1+4=", "20+5000=", "a question that is longer than the others: ", "why?", "no"]
    folder = write_tasks([{"q": question, "a": "2", "i": 0} for question in questions])
    said = [tokenizer.decode(by_hand(model, question, steps=4)) for question in questions]
    scores = []
    for size in (1, 2, 5):
        settings = TaskSettings(batch_size=size, log_samples=True)
        samples = lm_eval_tasks(model, tokenizer, ["toy_choose", "toy_say"], folder, settings, silent)["samples"]
        assert [sample["resps"][0][0] for sample in samples["toy_say"]] == said, size
        scores.append([score for one in samples["toy_choose"] for ((score, _),) in one["resps"]])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4) and scores[2] == pytest.approx(scores[0], rel=1e-4)


def test_progress_counts_the_answers(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, write_tasks: WriteTasks
) -> None:
    seen: dict[str, int] = {}

    def track(items: Any, label: str, total: int | None = None) -> Any:
        for item in items:
            seen[label] = item + 1
            yield item

    folder = write_tasks([{"q": f"{n}+1=", "a": "2", "i": n % 2} for n in range(4)])
    lm_eval_tasks(model, tokenizer, ["toy_choose", "toy_say"], folder, TaskSettings(), track)
    assert seen == {"log-likelihoods": 8, "generating": 4}


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Gemma3n"])
def test_a_model_with_towers(
    family: str, tokenizer: PreTrainedTokenizerFast, by_hand: Any, write_tasks: WriteTasks
) -> None:
    model, questions = make(family), ["1+4=", "why? because"]
    with torch.no_grad():  # no token beyond the tokenizer's is ever the likeliest
        model.get_output_embeddings().weight[len(tokenizer) :] = 0
    folder = write_tasks([{"q": question, "a": "2", "i": 0} for question in questions])
    settings = TaskSettings(batch_size=2, log_samples=True)
    samples = lm_eval_tasks(model, tokenizer, ["toy_choose", "toy_say"], folder, settings, silent)["samples"]
    said = [tokenizer.decode(by_hand(model, question, steps=4)) for question in questions]
    assert [sample["resps"][0][0] for sample in samples["toy_say"]] == said
