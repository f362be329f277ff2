"""Measure one configuration: the recipe's own model, the model of a step, or an adapted one at chosen ranks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.components import checks
from sqft.components.kinds import Searcher
from sqft.data.windows import text_windows
from sqft.errors import StageError
from sqft.modeling.adapters.adapted_linear import acting_weight, cached_effective_weights
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.saving import read_ranks
from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.evaluation import exact_match, perplexity
from sqft.modeling.evaluation.peft_adapter import attach_peft_adapter
from sqft.modeling.loading import load_model
from sqft.planning.plan import Plan
from sqft.ranks import RankConfig, RecordValue, TrainingStep
from sqft.recipe.measures import ExactMatch
from sqft.recipe.sections import Evaluate
from sqft.stages.adapted import load_adapted_model, training_steps
from sqft.stages.inputs import Report, StageInputs
from sqft.utils.files import write_json

if TYPE_CHECKING:
    from sqft.modeling.evaluation.harness import TaskSettings

PREDICTIONS, SAMPLES = "predictions.jsonl", "samples"
"""Names, in the artifact, of a file and a folder of JSON Lines."""


class EvaluateStage:
    """The stage `evaluate`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs, self.section = inputs, inputs.section(Evaluate)

    def run(self) -> Report:
        """Write `results.json`: every measurement. What is there already is kept, task by task: of an earlier attempt
        that failed, or of other evaluations of the same model (`earlier`).

        `texts` has the perplexity of each text by its role among the step's files, and `perplexity` that of the first.
        `predictions.jsonl` has each answer of `exact_match`, and `samples/TASK.jsonl` those of an lm-eval task, where
        the recipe asks for them.
        """
        file = self.inputs.scratch / "results.json"
        results: Report = json.loads(file.read_text("utf-8")) if file.is_file() else {}
        with self._subject() as (model, tokenizer, facts):
            for role in self.section.texts:
                if role not in results.setdefault("texts", {}):
                    found = results["texts"][role] = self._perplexity(role, model, tokenizer)
                    results.setdefault("perplexity", {name: found[name] for name in ("perplexity", "nll", "tokens")})
                    write_json(file, results)
            if self.section.texts:  # in their order, whichever were there before
                results["texts"] = {role: results["texts"][role] for role in self.section.texts}
            if self.section.exact_match and "exact_match" not in results:
                results["exact_match"] = self._exact_match(self.section.exact_match, model, tokenizer)
                write_json(file, results)
            for task in self.section.tasks:
                if task not in results.get("lm_eval", {}).get("names", ()):
                    self._task(task, model, tokenizer, results)
                    write_json(file, results)
        return {**results, **facts}

    def _perplexity(self, role: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Report:
        text = self.section.texts[role]
        with self.inputs.data.reading(role) as file:
            windows = text_windows(file, tokenizer, text.tokens, text.length)
        return perplexity(model, windows, self.inputs.track)

    def _exact_match(self, match: ExactMatch, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Report:
        records = self.inputs.data.records("exact_match.data", match.data)
        asked = match.answer, match.max_new_tokens, match.batch_size
        found = exact_match(model, tokenizer, records, *asked, self.inputs.track, match.tolerance)
        write_lines(self.inputs.scratch / PREDICTIONS, found.pop("predictions"))
        return found

    def _task(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, results: dict[str, Any]
    ) -> None:
        """Add what a task, or a group of tasks, gives to the results."""
        from sqft.modeling.evaluation.harness import lm_eval_tasks

        inputs, section = self.inputs, self.section
        folder = inputs.data.file("include_path") if section.include_path else None  # lm-eval reads it at once
        found = lm_eval_tasks(model, tokenizer, [name], folder, task_settings(inputs.plan, section), inputs.track)
        for task, samples in found["samples"].items():
            file = self.inputs.scratch / SAMPLES / f"{task.replace('/', '_')}.jsonl"
            file.parent.mkdir(exist_ok=True)
            write_lines(file, samples)
        before = results.get("lm_eval", {})
        # A task of two groups has the number of the last: what comes later and was there before is measured again.
        later, parts = section.tasks[section.tasks.index(name) + 1 :], found["metrics"].keys()
        known = {one: own for one, own in before.get("names", {}).items() if one not in later or parts.isdisjoint(own)}
        for one in before.get("names", {}).keys() - known.keys():
            results.get("earlier", {}).pop(f"tasks.{one}", None)
        results["tasks"] = results.get("tasks", {}) | found["metrics"]
        results["lm_eval"] = found["settings"] | {
            "names": known | {name: list(parts)},
            "tasks": before.get("tasks", {}) | found["tasks"],
        }

    def verify(self) -> None:
        """Check nothing: measurements promise nothing of a model, and `run` refuses a perplexity that is not finite."""

    @contextmanager
    def _subject(self) -> Iterator[tuple[PreTrainedModel, PreTrainedTokenizerBase, Report]]:
        """Yield the model to measure, on the device, its tokenizer, and its sparsity and number of parameters."""
        inputs, plan = self.inputs, self.inputs.plan
        if "finetune" not in inputs.folders:
            merged = inputs.folders.get("merge")
            model, tokenizer = load_model(plan.spec(merged / "model" if merged else inputs.model_path()))
            facts = count_zeros(model)  # an adapter beside its base has no part in them, whoever wrote it
            if "adapter" in inputs.step.files:
                with inputs.data.reading("adapter") as weights, inputs.data.reading("adapter.config"):
                    facts |= {"trainable": attach_peft_adapter(model, weights.parent)}
            yield model.to(inputs.device), tokenizer, facts
            return
        adapted = load_adapted_model(plan, inputs.folders, inputs.folders["finetune"], inputs.device)
        config = self._ranks(adapted)
        adapted.set_ranks(config)
        facts = count_zeros(adapted.model) | {"trainable": adapted.parameter_count(config)}
        with cached_effective_weights(adapted.model):
            yield adapted.model, adapted.tokenizer, facts

    def _ranks(self, adapted: AdaptedModel) -> RankConfig:
        """Return the ranks to measure: those that the search chose, or that this step's own searcher names."""
        if "search" in self.inputs.folders:
            config = read_ranks(self.inputs.folders["search"])
        else:
            searcher = self.inputs.step.component(Searcher)
            evaluate = _NoEvaluation(self.inputs.folders["finetune"])
            config = searcher.search(adapted.measured_space(), evaluate, Random(self.inputs.seed_for("search")))
        checks.check_choice("the chosen configuration", adapted.space, config)
        return config


def task_settings(plan: Plan, section: Evaluate) -> TaskSettings:
    """Return how lm-eval asks: the template's arguments are the model's and the section's own."""
    from sqft.modeling.evaluation.harness import TaskSettings

    given = {field.name: getattr(section, field.name) for field in fields(TaskSettings)}
    given["chat_template_kwargs"] = plan.recipe.model.chat_template_kwargs | section.chat_template_kwargs
    return TaskSettings(**given)


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


def write_lines(file: Path, items: Iterable[Any]) -> None:
    """Write JSON Lines; what JSON does not know (arrays, sets) as text."""
    with file.open("w", encoding="utf-8", errors="backslashreplace") as stream:  # half a pair, as JSON spells it
        stream.writelines(json.dumps(item, ensure_ascii=False, default=str) + "\n" for item in items)


class _NoEvaluation:
    """`sqft.ranks.Evaluate` for searchers that promise to evaluate nothing."""

    def __init__(self, finetuned: Path) -> None:
        self.finetuned = finetuned

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        raise StageError("evaluate.of takes only searchers that need no evaluation")

    def each(self, choice: RankConfig, samples: int | None = None) -> Sequence[RecordValue]:
        raise StageError("evaluate.of takes only searchers that need no evaluation")

    def within(self, seconds: float | None) -> bool:
        return True  # nothing was evaluated

    def first_order(self, samples: int | None = None) -> Sequence[Sequence[float]]:
        raise StageError("evaluate.of takes only searchers that need no evaluation")

    def training(self) -> Sequence[TrainingStep]:
        return training_steps(self.finetuned)
