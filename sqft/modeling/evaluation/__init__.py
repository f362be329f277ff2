"""Measure a model: perplexity, exact match by generation, the loss; `harness` has lm-eval's tasks."""

from sqft.modeling.evaluation.measures import exact_match, example_losses, perplexity, summed_loss

__all__ = ["example_losses", "exact_match", "perplexity", "summed_loss"]
