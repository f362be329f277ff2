"""Means, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """Return the weighted mean and its standard error by the spread of the values; None for one value.

    The error is that of a ratio of sums, sqrt(n / (n − 1) · Σ (w (x − mean))²) / Σ w (Cochran, Sampling Techniques,
    §6.4). With equal weights it is the standard error of a plain mean.
    """
    total, n = sum(weights), len(values)
    mean = math.fsum(x * w for x, w in zip(values, weights, strict=True)) / total
    if n < 2:
        return mean, None
    squares = math.fsum((w * (x - mean)) ** 2 for x, w in zip(values, weights, strict=True))
    return mean, math.sqrt(n / (n - 1) * squares) / total


def paired_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[float, float | None]:
    """Return how much higher `after`'s mean negative log-likelihood is on the same text, and its standard error.

    The windows are compared one by one, so most of a text's spread, which both models see, cancels out.

    Args:
        before: a text's entry in `texts` of a report's row; see `sqft.modeling.evaluation.perplexity`.
        after: the same of another model.

    Raises:
        ValueError: when the two were not measured on the same windows.
    """
    counts = before["window_tokens"]
    if counts != after["window_tokens"]:
        raise ValueError("the two were measured on other windows; use the same text, tokens, length and tokenizer")
    return weighted_mean([b - a for a, b in zip(before["windows"], after["windows"], strict=True)], counts)
