"""A model that says something, decoding by hand, and two tasks for lm-eval."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ByHand = Callable[..., list[int]]


@pytest.fixture
def talker(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """Weights large enough that what it says depends on every token before, and on where it stands."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.5)
    return model


@pytest.fixture
def by_hand(tokenizer: PreTrainedTokenizerFast) -> ByHand:
    """Greedy decoding, one whole forward pass a step, no padding and no cache."""

    def decode(model: Any, prompt: str, ends: Sequence[int] = (1,), steps: int = 8) -> list[int]:
        start = tokenizer(prompt)["input_ids"] or [tokenizer.eos_token_id]
        ids: list[int] = []
        for _ in range(steps):
            token = int(model(torch.tensor([start + ids]), use_cache=False).logits[0, -1].argmax())
            if token in ends:
                break
            ids.append(token)
        return ids

    return decode


@pytest.fixture
def write_tasks(tmp_path: Path) -> Callable[[list[dict[str, Any]]], Path]:
    """Writes `toy_choose` and `toy_say`, of documents with a question, an answer and the index of a choice."""

    def write(documents: list[dict[str, Any]]) -> Path:
        folder = tmp_path / "tasks"
        folder.mkdir()
        (folder / "d.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
        source = (
            f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder / 'd.jsonl'}\ntest_split: test\n"
            "metadata: {version: 2.5}\n"
        )
        (folder / "choose.yaml").write_text(
            f"task: toy_choose\n{source}output_type: multiple_choice\ndoc_to_text: '{{{{q}}}}'\ndoc_to_target: i\n"
            "doc_to_choice: ['1', '2']\nmetric_list:\n  - {metric: acc, aggregation: mean, higher_is_better: true}\n"
            "  - {metric: acc_norm, aggregation: median, higher_is_better: true}\n"
        )
        (folder / "say.yaml").write_text(
            f"task: toy_say\n{source}output_type: generate_until\ndoc_to_text: '{{{{q}}}}'\n"
            "doc_to_target: '{{a}}'\ngeneration_kwargs: {until: ['<|im_end|>'], max_gen_toks: 4}\n"
            "filter_list:\n  - {name: strict, filter: [{function: take_first}]}\n"
            "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
        )
        return folder

    return write
