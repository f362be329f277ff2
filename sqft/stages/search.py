"""Choose a sub-adapter. Every answer is remembered on disk, so a killed search asks and pays once."""

from __future__ import annotations

import json
import logging
import math
from random import Random
from typing import cast

from safetensors.torch import load_file

from sqft.components import checks
from sqft.components.kinds import Searcher
from sqft.data.encoding import Tokenization
from sqft.data.records import Record
from sqft.errors import ArtifactError, ContractError, StageError
from sqft.modeling.adapters.adapted_linear import cached_effective_weights
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.saving import adapter_tensors, read_ranks, store_adapter, store_ranks
from sqft.modeling.evaluation import exact_match, mean_loss
from sqft.recipe.sections import Finetune, Search
from sqft.stages.adapted import load_adapted_model
from sqft.stages.inputs import Report, StageInputs
from sqft.types import RankConfig
from sqft.utils.progress import silent

log = logging.getLogger("sqft")


class SearchStage:
    """The stage `search`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs = inputs

    def run(self) -> Report:
        return _run(self.inputs)

    def verify(self) -> None:
        _verify(self.inputs)


def _run(inputs: StageInputs) -> Report:
    """Write `choice.json`, `trials.jsonl` and the chosen sub-adapter in `adapter/`."""
    searcher, label = inputs.component(Searcher), inputs.label(Searcher)
    adapted = load_adapted_model(inputs.plan, inputs.folders, inputs.folders["finetune"], inputs.device)
    evaluate = CachedEvaluator(inputs, adapted)
    choice = searcher.search(adapted.space, evaluate, Random(inputs.seed_for("search")))
    checks.check_choice(label, adapted.space, choice)
    store_ranks(choice, inputs.scratch)
    base = str(inputs.plan.adapter_base.model(inputs.folders).resolve())
    store_adapter(adapted, choice, base, inputs.scratch / "adapter")
    ranks = adapted.space.ranks_by_linear(choice)
    return {
        "searcher": searcher.name,
        "trials": len(evaluate.known),
        "value": evaluate.best(choice),
        "mean_rank": sum(ranks.values()) / len(ranks),
        "trainable": adapted.parameter_count(choice),
    }


def _verify(inputs: StageInputs) -> None:
    """The stored choice lies in the space, and the stored factors are the trained ones, sliced."""
    adapted = load_adapted_model(inputs.plan, inputs.folders, inputs.folders["finetune"], "cpu")
    choice = read_ranks(inputs.scratch)
    checks.check_choice(inputs.label(Searcher), adapted.space, choice)
    (file,) = (inputs.scratch / "adapter").glob("*.safetensors")
    stored = load_file(file)
    for key, tensor in adapter_tensors(adapted, choice).items():
        if key not in stored or not stored[key].equal(tensor):
            raise ArtifactError(f"search: {key} as stored is not the trained one")


class CachedEvaluator:
    """`Evaluate` over a validation set in one seeded order, each trial written down before it is answered."""

    def __init__(self, inputs: StageInputs, adapted: AdaptedModel) -> None:
        self.inputs, self.adapted = inputs, adapted
        self.section = inputs.section(Search)
        self.file = inputs.scratch / "trials.jsonl"
        self.known: dict[tuple[RankConfig, int], float] = {}
        self.records: list[Record] = []
        if inputs.component(Searcher).evaluates:
            given = self.section.data
            self.records = inputs.data.records("data", given) if given else inputs.data.training_records()[1]
            Random(inputs.seed_for("proxy")).shuffle(self.records)
        self._recall()

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        searcher = self.inputs.label(Searcher)
        checks.check_choice(searcher, self.adapted.space, choice)
        if samples is not None and (type(samples) is not int or samples < 1):
            raise ContractError(
                f"{searcher} asked for an evaluation on {samples!r} samples, expected 1 or more, or None"
            )
        if not self.records:
            raise StageError(f"{searcher} asked for an evaluation, but search.data is not given")
        count = min(samples or len(self.records), len(self.records))
        key = (choice, count)
        if key not in self.known:
            value = self._measure(choice, self.records[:count])
            with self.file.open("a") as stream:
                stream.write(json.dumps({"ranks": choice.ranks, "samples": count, "value": value}) + "\n")
            self.known[key] = value
            log.info("trial %d: %.4f on %d samples", len(self.known), value, count)
        return self.known[key]

    def best(self, choice: RankConfig) -> float | None:
        """The chosen configuration's value on the most samples it was tried on."""
        values = {count: value for (tried, count), value in self.known.items() if tried == choice}
        return values[max(values)] if values else None

    def _measure(self, choice: RankConfig, records: list[Record]) -> float:
        self.adapted.set_ranks(choice)
        section, model, tokenizer = self.section, self.adapted.model, self.adapted.tokenizer
        with cached_effective_weights(self.adapted.model):
            if section.metric == "exact_match":
                result = exact_match(
                    model, tokenizer, records, section.answer, section.max_new_tokens, section.batch_size, silent
                )
                value = float(result["accuracy"])
            else:
                tuning = cast(Finetune, self.inputs.plan.step("finetune").section)
                encoded = Tokenization(tokenizer, tuning.max_length, tuning.loss_on).encode(records)
                pad = cast(int, tokenizer.pad_token_id)
                value = -mean_loss(model, encoded.examples, section.batch_size, pad, silent)
        if not math.isfinite(value):
            raise StageError(f"the {section.metric} of ranks {choice.ranks} is not finite")
        return value

    def _recall(self) -> None:
        """Read an earlier try's trials; a last line that a kill cut short is dropped."""
        if not self.file.is_file():
            return
        for line in self.file.read_text().splitlines():
            try:
                trial = json.loads(line)
                self.known[RankConfig(tuple(trial["ranks"])), trial["samples"]] = trial["value"]
            except (ValueError, KeyError, TypeError):
                break
        lines = [json.dumps({"ranks": c.ranks, "samples": n, "value": v}) + "\n" for (c, n), v in self.known.items()]
        self.file.write_text("".join(lines))
