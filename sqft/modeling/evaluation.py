"""Measure a model: perplexity, exact match by generation, lm-eval's tasks."""

from __future__ import annotations

import logging
import math
import os
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sqft.data.answers import Answer, extract_answer
from sqft.data.collators import Collator
from sqft.data.encoding import IGNORED, Example, encode_prompts, truncate_prompts
from sqft.errors import StageError
from sqft.modeling.training.loss import CompletionLoss
from sqft.utils.progress import Track

log = logging.getLogger("sqft")
BOOTSTRAP = 1000
"""Resamples for the standard errors that lm-eval cannot compute in closed form (F1, BLEU, a median; a mean
has a formula): they know that error to 1/sqrt(2 * 1000), about 2%. lm-eval's 100,000 take minutes for a third digit."""


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Sequence[Tensor], track: Track) -> dict[str, float]:
    """Compute exp of the mean negative log-likelihood of every token but each window's first."""
    total, tokens = 0.0, 0
    with eval_mode(model):
        for window in track(windows, "perplexity", len(windows)):
            ids = window[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            total += F.cross_entropy(logits, ids[0, 1:], reduction="none").double().sum().item()
            tokens += len(window) - 1
    nll = total / tokens
    if not nll < math.log(sys.float_info.max):
        raise StageError("the perplexity is not finite; the model's precision may be too low")
    return {"perplexity": math.exp(nll), "nll": nll, "tokens": tokens}


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
    """Generate greedily from every prompt, and compare the answer with that of its completion.

    A prompt that leaves no room for `max_new_tokens` in the model's window is cut at the left, as in training.

    Args:
        model: on the device that generates.
        tokenizer: the model's.
        records: with a prompt and a completion each.
        answer: how an answer is found in a text.
        max_new_tokens: tokens to generate at most.
        batch_size: prompts at a time, padded at the left; prompts of about the same length are together.
        track: shows progress.

    Raises:
        DataError: naming a record that has no prompt or no completion.
        StageError: when no prompt would leave room, or logits are not finite.
    """
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    prompts, long = truncate_prompts(encode_prompts(records, tokenizer), window, max_new_tokens)
    if long:
        log.warning(
            "%d of %d prompts were cut at the left to %d tokens: the window is %d",
            long,
            len(prompts),
            window - max_new_tokens,
            window,
        )
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index][0]))
    outcomes = [False] * len(prompts)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    with eval_mode(model), _finite(model), _greedy(model, tokenizer) as settings:
        settings.max_new_tokens = max_new_tokens
        for batch in track(batches, "generating", len(batches)):
            texts = _generate(model, tokenizer, [prompts[index][0] for index in batch], settings)
            for index, text in zip(batch, texts, strict=True):
                wanted = extract_answer(prompts[index][1], answer)
                outcomes[index] = wanted != "" and extract_answer(text, answer) == wanted
    n, correct = len(outcomes), sum(outcomes)
    p = correct / n
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
    return {"accuracy": p, "stderr": error, "correct": correct, "samples": n, "outcomes": outcomes}


def _generate(
    model: PreTrainedModel, tokenizer: Any, prompts: Sequence[Sequence[int]], settings: GenerationConfig
) -> list[str]:
    """Generate from a batch of prompts, padded at the left; return the texts up to their end of sequence."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)  # [batch, longest]
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
    )
    texts = []
    for tokens in output[:, longest:].tolist():
        end = next((at for at, token in enumerate(tokens) if token in settings.eos_token_id), None)
        texts.append(tokenizer.decode(tokens[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return texts


def mean_loss(model: PreTrainedModel, examples: Sequence[Example], batch_size: int, pad_id: int, track: Track) -> float:
    """Compute the mean cross-entropy of a labelled token. See `summed_loss` for the arguments."""
    total, labels = summed_loss(CompletionLoss(model), examples, batch_size, pad_id, track)
    return total / labels


@torch.no_grad()
def summed_loss(
    loss: CompletionLoss, examples: Sequence[Example], batch_size: int, pad_id: int, track: Track
) -> tuple[float, int]:
    """Compute the sum of the cross-entropies of all labelled tokens, and count them.

    Args:
        loss: the model with its loss.
        examples: token sequences with labels.
        batch_size: examples in a batch.
        pad_id: the token that fills shorter examples.
        track: the progress display.
    """
    collate, device = Collator(pad_id), next(loss.parameters()).device
    total, labels = 0.0, 0
    starts = range(0, len(examples), batch_size)
    with eval_mode(loss):
        for start in track(starts, "loss", len(starts)):
            batch = {name: tensor.to(device) for name, tensor in collate(examples[start : start + batch_size]).items()}
            total += loss(**batch, num_items_in_batch=1)["loss"].item()
            labels += int((batch["labels"] != IGNORED).sum())
    return total, labels


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: list[str],
    include_path: Path | None,
    limit: int | None,
    batch_size: int,
) -> dict[str, dict[str, float]]:
    """Run lm-eval; return its metrics of each task, with standard errors where it has them.

    Args:
        model: on the device to run on.
        tokenizer: the model's.
        tasks: names of lm-eval's tasks, or of those in `include_path`.
        include_path: a folder of more tasks.
        limit: examples of each task; None means all.
        batch_size: examples at a time.

    Raises:
        StageError: when lm-eval knows no task of a name, or logits are not finite.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(include_path) if include_path else None)
    if unknown := sorted(set(tasks) - set(manager.all_tasks)):
        where = f", nor in {include_path}" if include_path else "; give your own with evaluate.include_path"
        raise StageError(f"lm-eval has no task '{unknown[0]}'{where}")
    with eval_mode(model), _finite(model), _greedy(model, tokenizer), _undisturbed(model):
        measured = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            task_manager=manager,
            limit=limit,
            log_samples=False,
            bootstrap_iters=BOOTSTRAP,
        )
    return {task: _metrics(entries) for task, entries in measured["results"].items()}


def _metrics(entries: dict[str, Any]) -> dict[str, float]:
    """Return the numbers among one task's results that are metrics: lm-eval names only those "metric,filter".

    "acc_stderr,none" becomes "acc_stderr", and "exact_match_stderr,strict" "exact_match,strict_stderr".
    """
    metrics = {}
    for key, value in entries.items():
        name, comma, kind = key.partition(",")
        if comma and isinstance(value, Real):  # an error that lm-eval cannot compute is "N/A"
            metric = name.removesuffix("_stderr")
            metrics[(metric if kind == "none" else f"{metric},{kind}") + name[len(metric) :]] = float(value)
    return metrics


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and afterwards each module back to its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _finite(model: PreTrainedModel) -> Iterator[None]:
    """Refuse logits that are not finite: they would pass for wrong answers.

    Raises:
        StageError: from the model's forward.
    """

    def check(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> None:
        # With a mask there is padding at the left, whose logits may be anything; the last position is always a token.
        logits = output.logits if given.get("attention_mask") is None else output.logits[:, -1]
        if not logits.amax().isfinite():
            raise StageError("the model's logits are not finite; its precision may be too low")

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _greedy(model: PreTrainedModel, tokenizer: Any) -> Iterator[GenerationConfig]:
    """Make generation plain and greedy; of the settings in the model's folder only the ends of sequence stay.

    `generate` takes every setting that is not given to it from `model.generation_config`, penalties and forced tokens
    included, and so that one is replaced meanwhile.
    """
    own = model.generation_config
    ends = own.eos_token_id if own is not None else None
    all_ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id]
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({end for end in all_ends if end is not None}),
    )
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = own


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Undo what lm-eval does to the process.

    It seeds Python's, NumPy's and torch's generators (results need that, for tasks that draw examples),
    prints to standard output, forks a pool of processes to resample, and warns that the model is an object.
    """
    python, numbers, pool = random.getstate(), np.random.get_state(), os.environ.get("DISABLE_MULTIPROC")
    wrapper = logging.getLogger("lm_eval.models.huggingface")
    level = wrapper.level
    os.environ["DISABLE_MULTIPROC"] = "1"
    wrapper.setLevel(logging.ERROR)
    try:
        with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []), redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        wrapper.setLevel(level)
        os.environ.pop("DISABLE_MULTIPROC")
        if pool is not None:
            os.environ["DISABLE_MULTIPROC"] = pool
