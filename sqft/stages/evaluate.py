"""Measure one configuration: the recipe's own model, the model of a step, or an adapted one at chosen ranks."""

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
from sqft.types import RankConfig, SearchSpace
from sqft.utils.files import write_json


class EvaluateStage:
    """The stage `evaluate`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs, self.section = inputs, inputs.section(Evaluate)

    def run(self) -> Report:
        """Write `results.json`: every measurement, with the outcome of each item."""
        section, data, track = self.section, self.inputs.data, self.inputs.track
        results: dict[str, Any] = {}
        with self._subject() as (model, tokenizer, facts):
            if text := section.perplexity:
                with data.reading("perplexity.text") as file:
                    windows = text_windows(file, tokenizer, text.tokens, text.length)
                results["perplexity"] = perplexity(model, windows, track)
            if match := section.exact_match:
                records = data.records("exact_match.data", match.data)
                results["exact_match"] = exact_match(
                    model, tokenizer, records, match.answer, match.max_new_tokens, match.batch_size, track
                )
            if section.tasks:
                folder = data.file("include_path") if section.include_path else None  # lm-eval reads it at once
                tasks = list(section.tasks)
                results["tasks"] = lm_eval_tasks(model, tokenizer, tasks, folder, section.limit, section.batch_size)
        write_json(self.inputs.scratch / "results.json", results)
        summary = {name: {k: v for k, v in result.items() if k != "outcomes"} for name, result in results.items()}
        return {**summary, **facts}

    def verify(self) -> None:
        """Check nothing: measurements promise nothing of a model, and `run` refuses a perplexity that is not finite."""

    @contextmanager
    def _subject(self) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase, Report]]:
        """Yield the model to measure, on the device, its tokenizer, and its sparsity and number of parameters."""
        inputs, plan = self.inputs, self.inputs.plan
        if "finetune" not in inputs.folders:
            merged = inputs.folders.get("merge")
            model, tokenizer = load_model(plan.spec(merged / "model" if merged else inputs.model_path()))
            yield model.to(inputs.device), tokenizer, count_zeros(model)
            return
        adapted = load_adapted_model(plan, inputs.folders, inputs.folders["finetune"], inputs.device)
        config = self._ranks(adapted.space)
        adapted.set_ranks(config)
        facts = count_zeros(adapted.model) | {"trainable": adapted.parameter_count(config)}
        with cached_effective_weights(adapted.model):
            yield adapted.model, adapted.tokenizer, facts

    def _ranks(self, space: SearchSpace) -> RankConfig:
        """Return the ranks to measure: those that the search chose, or that this step's own searcher names."""
        if "search" in self.inputs.folders:
            config = read_ranks(self.inputs.folders["search"])
        else:
            searcher = self.inputs.step.component(Searcher)
            config = searcher.search(space, _no_evaluation, Random(self.inputs.seed_for("search")))
        checks.check_choice("the chosen configuration", space, config)
        return config


def count_zeros(model: PreTrainedModel) -> Report:
    """Count zeros in the weights of the decoder blocks' linear layers as they act: adapted ones with their deltas."""
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
