"""Measure one configuration: the dense model, a stage's model, or an adapted one at named ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, cast

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.components import checks
from sqft.components.kinds import Searcher
from sqft.data.windows import text_windows
from sqft.errors import StageError
from sqft.modeling.adapters.adapted_linear import acting_weight, cached_effective_weights
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.evaluation import exact_match, lm_eval_tasks, perplexity
from sqft.recipe.sections import Evaluate
from sqft.stages.adapted import base_model, load_adapted_model
from sqft.stages.context import Context
from sqft.types import RankConfig
from sqft.utils.files import write_json


def run(context: Context) -> dict[str, Any]:
    """Write `results.json`, outcomes of single items included."""
    section = cast(Evaluate, context.step.section)
    results: dict[str, Any] = {}
    with _subject(context) as (model, tokenizer, facts):
        if section.perplexity:
            with context.reading("perplexity") as text:
                windows = text_windows(text, tokenizer, section.perplexity.tokens, section.perplexity.length)
            results["perplexity"] = perplexity(model, windows, context.track)
        if section.exact_match:
            match = section.exact_match
            records = context.records("exact_match", match.data)
            results["exact_match"] = exact_match(
                model, tokenizer, records, match.answer, match.max_new_tokens, match.batch_size, context.track
            )
        if section.tasks:
            folder = context.file("include_path") if section.include_path else None  # lm-eval reads it at once
            results["tasks"] = lm_eval_tasks(
                model, tokenizer, list(section.tasks), folder, section.limit, section.batch_size
            )
    write_json(context.folder / "results.json", results)
    summary = {name: {k: v for k, v in result.items() if k != "outcomes"} for name, result in results.items()}
    return {**summary, **facts}


def verify(context: Context) -> None:
    """Measurements promise nothing of a model; a perplexity that is not finite was refused when it was taken."""


@contextmanager
def _subject(context: Context) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]]:
    """The model to measure, on its device, and its facts: sparsity and parameters that train."""
    plan = context.plan
    if "finetune" not in context.inputs:
        merged = context.inputs.get("merge")
        model, tokenizer = base_model(plan, merged / "model" if merged else context.model_folder())
        yield model.to(context.device), tokenizer, _facts(model)
        return
    tuned = load_adapted_model(plan, context.base(), context.inputs["finetune"], context.device)
    if "search" in context.inputs:
        choice = read_ranks(context.inputs["search"])
    else:
        searcher = context.component(Searcher)
        choice = searcher.search(tuned.space, _no_evaluation, Random(context.seed_for("search")))
    checks.check_choice("the chosen configuration", tuned.space, choice)
    tuned.set_ranks(choice)
    facts = _facts(tuned.model) | {"trainable": tuned.trained(choice)}
    with cached_effective_weights(tuned.model):
        yield tuned.model, tuned.tokenizer, facts


def _facts(model: PreTrainedModel) -> dict[str, Any]:
    """Zeros in the weights of the decoder blocks' linear layers, as they act: adapted ones with their deltas."""
    zeros = total = 0
    for block in decoder_blocks(model).values():
        for module in block.modules():
            weight = acting_weight(module)
            if weight is not None and weight.dim() == 2:
                zeros += int((weight == 0).sum())
                total += weight.numel()
    return {"sparsity": zeros / total, "zeros": zeros, "weights": total}


def _no_evaluation(choice: RankConfig, samples: int | None = None) -> float:
    raise StageError("evaluate.of takes only searchers that need no evaluation")
