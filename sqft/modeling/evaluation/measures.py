"""Perplexity, exact match by generation, and the loss."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sqft.data.answers import Answer, extract_answer, is_right, without_reasoning
from sqft.data.chat_tokens import special_tokens
from sqft.data.collators import Collator
from sqft.data.encoding import IGNORED, Example, Prompt, encode_prompts, truncate_prompts
from sqft.errors import StageError
from sqft.modeling.evaluation.generation import eval_mode, finite, generate, greedy, padding_matters
from sqft.modeling.training.loss import CompletionLoss
from sqft.utils.progress import Track
from sqft.utils.statistics import weighted_mean

log = logging.getLogger("sqft")


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Sequence[Tensor], track: Track) -> dict[str, Any]:
    """Compute exp of the mean negative log-likelihood of every token but each window's first.

    Returns `perplexity`, the mean `nll`, its `stderr` by the spread of the windows (None when there is only one), the
    number of predicted `tokens`, and of each window the mean nll, `windows`, and that number, `window_tokens`.
    """
    sums: list[float] = []
    with eval_mode(model):
        for window in track(windows, "perplexity", len(windows)):
            ids = window[None].to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            sums.append(F.cross_entropy(logits, ids[0, 1:], reduction="none").double().sum().item())
    counts = [len(window) - 1 for window in windows]
    nll = sum(sums) / sum(counts)
    if not nll < math.log(sys.float_info.max):
        raise StageError("the perplexity is not finite; the model's precision may be too low")
    means = [total / count for total, count in zip(sums, counts, strict=True)]
    whole = {"perplexity": math.exp(nll), "nll": nll, "tokens": sum(counts), "stderr": weighted_mean(means, counts)[1]}
    return {**whole, "windows": means, "window_tokens": counts}


@torch.inference_mode()
def exact_match(
    model: PreTrainedModel,
    tokenizer: Any,
    records: Sequence[dict[str, Any]],
    answer: Answer,
    max_new_tokens: int,
    batch_size: int,
    track: Track,
    tolerance: float = 0.0,
) -> dict[str, Any]:
    """Generate greedily from every prompt, and compare the answer with that of its completion.

    A prompt that leaves no room for `max_new_tokens` in the model's window is cut at the left, as in training.

    Returns the accuracy with its standard error, and `predictions`: for each record the prompt that the model was
    given, what it generated, the answer in that, the expected answer, and whether it is right.

    Args:
        model: on the device that generates.
        tokenizer: the model's.
        records: with a prompt and a completion each.
        answer: how an answer is found in a text.
        max_new_tokens: tokens to generate at most.
        batch_size: prompts at a time, those of about the same length together, padded at the left; where padding
            would change an answer, only prompts of equal length.
        track: shows progress.
        tolerance: the largest difference between a number and the expected one.

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
    predictions: list[dict[str, Any]] = [{} for _ in prompts]
    ends = [prompt.end for prompt in prompts if prompt.end is not None]
    with eval_mode(model), finite(model), greedy(model, tokenizer, ends) as settings:
        settings.max_new_tokens = max_new_tokens
        equal = padding_matters(model, settings.pad_token_id, [prompt.ids for prompt in prompts])
        batches = _batches(prompts, batch_size, equal)
        for batch in track(batches, "generating", len(batches)):
            answers = generate(model, settings.pad_token_id, [prompts[index].ids for index in batch], settings)
            for index, tokens in zip(batch, answers, strict=True):
                text, said = _texts(tokenizer, tokens, prompts[index])
                found, wanted = (extract_answer(part, answer) for part in (said, prompts[index].completion))
                predictions[index] = {
                    "record": index + 1,
                    "prompt": tokenizer.decode(prompts[index].ids),
                    "generated": text,
                    "answer": found,
                    "expected": wanted,
                    "right": is_right(found, wanted, tolerance),
                }
    n, correct = len(predictions), sum(prediction["right"] for prediction in predictions)
    p = correct / n
    error = math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else 0.0
    return {"accuracy": p, "stderr": error, "correct": correct, "samples": n, "predictions": predictions}


def _texts(tokenizer: Any, tokens: list[int], prompt: Prompt) -> tuple[str, str]:
    """Return what was generated, and what it says after its reasoning, both without special tokens."""
    clean, full = (
        tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False) for skip in (True, False)
    )
    said = without_reasoning(full, prompt.marker, prompt.reasons)
    if said == full:
        return clean, clean
    for token in special_tokens(tokenizer):
        said = said.replace(token, "")
    return clean, said


def _batches(prompts: Sequence[Prompt], batch_size: int, equal: bool) -> list[list[int]]:
    """Return the indices of prompts in batches, by length; each of a single length where `equal`."""

    def length(index: int) -> int:
        return len(prompts[index].ids)

    order = sorted(range(len(prompts)), key=length)
    groups = [list(group) for _, group in groupby(order, length)] if equal else [order]
    return [group[start : start + batch_size] for group in groups for start in range(0, len(group), batch_size)]


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
    total, labels = 0.0, 0
    with eval_mode(loss):
        for batch in _collated(loss, examples, batch_size, pad_id, track):
            total += loss(**batch, num_items_in_batch=1)["loss"].item()
            labels += int((batch["labels"] != IGNORED).sum())
    return total, labels


@torch.no_grad()
def example_losses(
    loss: CompletionLoss, examples: Sequence[Example], batch_size: int, pad_id: int, track: Track
) -> list[tuple[float, int]]:
    """Compute, of each example, the sum of the cross-entropies of its labelled tokens, and their number.

    Args:
        loss: the model with its loss.
        examples: token sequences with labels.
        batch_size: examples in a batch.
        pad_id: the token that fills shorter examples.
        track: the progress display.
    """
    sums: list[tuple[float, int]] = []
    with eval_mode(loss):
        for batch in _collated(loss, examples, batch_size, pad_id, track):
            labelled = batch["labels"][:, 1:] != IGNORED  # [batch, tokens - 1]
            targets, counts = batch["labels"][:, 1:][labelled], labelled.sum(1).tolist()
            chunks = zip(loss.logits(**batch), torch.split(targets, loss.chunk or len(targets)), strict=True)
            tokens = torch.cat([F.cross_entropy(logits.float(), of, reduction="none") for logits, of in chunks])
            sums += [(rows.sum().item(), len(rows)) for rows in torch.split(tokens.double(), counts)]
    return sums


def _collated(
    loss: CompletionLoss, examples: Sequence[Example], batch_size: int, pad_id: int, track: Track
) -> Iterator[dict[str, Tensor]]:
    """Yield the examples in batches, on the device of the model; see `summed_loss` for the arguments."""
    collate, device = Collator(pad_id), next(loss.parameters()).device
    starts = range(0, len(examples), batch_size)
    for start in track(starts, "loss", len(starts)):
        batch = collate(examples[start : start + batch_size])
        yield {name: tensor.to(device) for name, tensor in batch.items()}
