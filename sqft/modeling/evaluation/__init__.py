"""Measure a model: perplexity, exact match by generation, the loss; `harness` has lm-eval's tasks."""

from sqft.modeling.evaluation.measures import exact_match, perplexity, summed_loss

__all__ = ["exact_match", "perplexity", "summed_loss"]
