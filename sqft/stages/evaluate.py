"""Measure one configuration: the dense model, a stage's model, or an adapted one at named ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.components import checks
from sqft.components.kinds import Searcher
from sqft.data.windows import text_windows
from sqft.errors import StageError
from sqft.modeling.adapters.adapted_linear import acting_weight, cached_effective_weights
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.evaluation import exact_match, lm_eval_tasks, perplexity
from sqft.modeling.loading import load_model
from sqft.recipe.sections import Evaluate
from sqft.stages.adapted import load_adapted_model
from sqft.stages.inputs import Report, StageInputs
from sqft.types import RankConfig
from sqft.utils.files import write_json


class EvaluateStage:
    """The stage `evaluate`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> Report:
        return _run(self.inputs)

    def verify(self) -> None:
        _verify(self.inputs)


def _run(inputs: StageInputs) -> Report:
    """Write `results.json`, outcomes of single items included."""
    section = inputs.section(Evaluate)
    results: dict[str, Any] = {}
    with _subject(inputs) as (model, tokenizer, facts):
        if section.perplexity:
            with inputs.data.reading("perplexity.text") as text:
                windows = text_windows(text, tokenizer, section.perplexity.tokens, section.perplexity.length)
            results["perplexity"] = perplexity(model, windows, inputs.track)
        if section.exact_match:
            match = section.exact_match
            records = inputs.data.records("exact_match.data", match.data)
            results["exact_match"] = exact_match(
                model, tokenizer, records, match.answer, match.max_new_tokens, match.batch_size, inputs.track
            )
        if section.tasks:
            folder = inputs.data.file("include_path") if section.include_path else None  # lm-eval reads it at once
            results["tasks"] = lm_eval_tasks(
                model, tokenizer, list(section.tasks), folder, section.limit, section.batch_size
            )
    write_json(inputs.scratch / "results.json", results)
    summary = {name: {k: v for k, v in result.items() if k != "outcomes"} for name, result in results.items()}
    return {**summary, **facts}


def _verify(inputs: StageInputs) -> None:
    """Measurements promise nothing of a model; a perplexity that is not finite was refused when it was taken."""


@contextmanager
def _subject(inputs: StageInputs) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]]:
    """The model to measure, on its device, and its facts: sparsity and parameters that train."""
    plan = inputs.plan
    if "finetune" not in inputs.folders:
        merged = inputs.folders.get("merge")
        model, tokenizer = load_model(plan.spec(merged / "model" if merged else inputs.model_path()))
        yield model.to(inputs.device), tokenizer, _facts(model)
        return
    adapted = load_adapted_model(plan, inputs.folders, inputs.folders["finetune"], inputs.device)
    if "search" in inputs.folders:
        choice = read_ranks(inputs.folders["search"])
    else:
        searcher = inputs.component(Searcher)
        choice = searcher.search(adapted.space, _no_evaluation, Random(inputs.seed_for("search")))
    checks.check_choice("the chosen configuration", adapted.space, choice)
    adapted.set_ranks(choice)
    facts = _facts(adapted.model) | {"trainable": adapted.parameter_count(choice)}
    with cached_effective_weights(adapted.model):
        yield adapted.model, adapted.tokenizer, facts


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
