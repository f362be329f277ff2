"""What a model can do: perplexity, exact match by generation, lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from sqft.data.batches import Collator
from sqft.data.prompts import IGNORED, Answer, Example, answer_of, prompt_ids
from sqft.errors import StageError
from sqft.modeling.loss import CompletionLoss
from sqft.progress import Track


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Sequence[Tensor], track: Track) -> dict[str, float]:
    """exp of the mean negative log-likelihood of every token but each window's first."""
    model.eval()
    total, tokens = 0.0, 0
    for window in track(windows, "perplexity", len(windows)):
        ids = window[None].to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += F.cross_entropy(logits, ids[0, 1:], reduction="none").double().sum().item()
        tokens += len(window) - 1
    if not math.isfinite(total):
        raise StageError("the perplexity is not finite; the model's precision may be too low")
    return {"perplexity": math.exp(total / tokens), "nll": total / tokens, "tokens": tokens}


@torch.inference_mode()
def exact_match(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    answer: Answer,
    max_new_tokens: int,
    batch_size: int,
    track: Track,
) -> dict[str, Any]:
    """Greedy generation from every prompt, compared with its completion; batches padded at the left."""
    model.eval()
    prompts = [prompt_ids(record, tokenizer) for record in records]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index][0]))
    outcomes = [False] * len(prompts)
    ends = model.generation_config.eos_token_id
    known = ends if isinstance(ends, list) else [ends]
    settings = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({e for e in (*known, tokenizer.eos_token_id) if e is not None}),
    )
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    for batch in track(batches, "generating", len(batches)):
        longest = max(len(prompts[index][0]) for index in batch)
        ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for row, index in enumerate(batch):
            prompt = prompts[index][0]
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        output = model.generate(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
        )
        for row, index in enumerate(batch):
            text = tokenizer.decode(output[row, longest:], skip_special_tokens=True)
            wanted = answer_of(prompts[index][1], answer)
            outcomes[index] = wanted != "" and answer_of(text, answer) == wanted
    n, correct = len(outcomes), sum(outcomes)
    p = correct / n
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
    return {"accuracy": p, "stderr": error, "correct": correct, "samples": n, "outcomes": outcomes}


@torch.inference_mode()
def mean_loss(model: PreTrainedModel, examples: Sequence[Example], batch_size: int, pad_id: int, track: Track) -> float:
    """The mean cross-entropy of a labelled token."""
    model.eval()
    loss, collate = CompletionLoss(model), Collator(pad_id)
    total, labels = 0.0, 0
    starts = range(0, len(examples), batch_size)
    for start in track(starts, "loss", len(starts)):
        rows = [{"input_ids": e.input_ids, "labels": e.labels} for e in examples[start : start + batch_size]]
        batch = {name: tensor.to(model.device) for name, tensor in collate(rows).items()}
        total += loss(**batch, num_items_in_batch=1)["loss"].item()
        labels += int((batch["labels"][:, 1:] != IGNORED).sum())
    return total / labels


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[str],
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """lm-eval's metrics of each task, with standard errors where it has them.

    Raises:
        StageError: when lm-eval knows no task of a name.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        where = f", nor in {include_path}" if include_path else "; give your own with evaluate.include_path"
        raise StageError(f"lm-eval has no task '{unknown[0]}'{where}")
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    found = lm_eval.simple_evaluate(model=wrapped, tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    results: dict[str, dict[str, float]] = {}
    for task, metrics in found["results"].items():
        kept = {name: value for name, value in metrics.items() if isinstance(value, int | float) and name != "alias"}
        results[task] = {_metric(name): float(value) for name, value in kept.items()}
    return results


def _metric(name: str) -> str:
    """lm-eval's "acc_stderr,none" as "acc_stderr"; another filter than "none" stays: "exact_match,strict"."""
    return name.removesuffix(",none")
