"""Choose a sub-adapter. Every evaluation is stored on disk, so that a search that was killed does not repeat it."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice, zip_longest
from pathlib import Path
from random import Random
from typing import Any, cast

from safetensors.torch import load_file

from sqft.components import checks
from sqft.components.kinds import Adapter, Searcher
from sqft.data.encoding import Encoded, Tokenization
from sqft.data.records import Record
from sqft.errors import ArtifactError, StageError
from sqft.modeling.adapters.adapted_linear import cached_effective_weights
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.adapters.saving import read_ranks, store_adapter, store_ranks, tensor_name
from sqft.modeling.evaluation import exact_match, example_losses
from sqft.modeling.evaluation.first_order import first_order_changes
from sqft.modeling.loading.parts import open_in_parts
from sqft.modeling.training.loss import CompletionLoss
from sqft.ranks import RankConfig, RecordValue, SearchSpace, TrainingStep
from sqft.recipe.sections import Finetune, Search
from sqft.stages.adapted import load_adapted_model, load_deltas, training_steps
from sqft.stages.adapter_in_parts import AdapterInParts
from sqft.stages.inputs import Report, StageInputs, section_of
from sqft.utils.files import CHECKPOINTS, write_text
from sqft.utils.progress import silent

log = logging.getLogger("sqft")
Differentiate = Callable[[int | None], list[list[float]]]
"""Compute `sqft.ranks.Evaluate.first_order`."""

TRIALS = "trials.jsonl"
"""File of the evaluations of a search, a JSON object a line: ranks, number of samples, value, and of those samples that
were new the totals and weights. While the search goes on, it lies among its checkpoints and has the seconds, too: the
artifact must not depend on them."""
NO_MORE = "no more"
"""Message to the other processes: the search has ended."""


class SearchStage:
    """The stage `search`."""

    def __init__(self, inputs: StageInputs) -> None:
        self.inputs, self.section = inputs, inputs.section(Search)
        self.searcher, self.label = inputs.step.component(Searcher), inputs.step.label(Searcher)

    @cached_property
    def adapted(self) -> AdaptedModel:
        """The model that `finetune` trained: opened once, to evaluate it and to check the stored sub-adapter.

        Where it is large and not evaluated, no weight of its base is in memory.
        """
        inputs = self.inputs
        if inputs.step.streamed:  # nothing is evaluated
            source = inputs.plan.spec(inputs.plan.adapter_base.model(inputs.folders))
            opened, tokenizer = open_in_parts(source, streamed=True)
            return AdapterInParts(inputs, opened, source).attach_all(tokenizer)
        return load_adapted_model(inputs.plan, inputs.folders, inputs.folders["finetune"], inputs.device)

    def run(self) -> Report:
        """Write `choice.json`, `trials.jsonl` and the chosen sub-adapter in `adapter/`.

        Of several processes the first one searches, and each of them measures its share of the records.
        """
        if not self.inputs.processes.is_main:
            return self._take_part()
        adapted, inputs = self.adapted, self.inputs
        space = adapted.measured_space()
        evaluate = CachedEvaluator(
            inputs.scratch / CHECKPOINTS / TRIALS,
            space,
            self._records,
            self._measure,
            self.label,
            partial(training_steps, inputs.folders["finetune"]),
            self._differentiate if self.searcher.needs_gradients() else None,
        )
        config = self.searcher.search(space, evaluate, Random(inputs.seed_for("search")))
        inputs.processes.broadcast(NO_MORE)
        checks.check_choice(self.label, adapted.space, config)
        store_ranks(config, inputs.scratch)
        evaluate.write(inputs.scratch / TRIALS)
        base = str(inputs.plan.adapter_base.model(inputs.folders).resolve())
        store_adapter(adapted, config, base, inputs.scratch / "adapter")
        ranks = adapted.space.ranks_by_linear(config)
        return {
            "searcher": self.searcher.name,
            "trials": len(evaluate.trials),
            "records": sum(map(len, evaluate.known.values())),
            "value": evaluate.value_on_most_samples(config),
            "front": evaluate.front(config),
            "mean_rank": sum(ranks.values()) / len(ranks),
            "trainable": adapted.parameter_count(config),
        }

    def verify(self) -> None:
        """Check that the stored configuration lies in the space, and that the stored factors are slices of those that
        the finetune artifact holds."""
        finetune = self.inputs.plan.step("finetune")
        load_deltas(self.adapted, self.inputs.folders["finetune"], finetune.label(Adapter))
        config = read_ranks(self.inputs.scratch)
        checks.check_choice(self.label, self.adapted.space, config)
        (file,) = (self.inputs.scratch / "adapter").glob("*.safetensors")
        stored = load_file(file)
        ranks = self.adapted.space.ranks_by_linear(config)
        for name, layer in self.adapted.layers.items():
            B, A, _ = layer.delta.factors(ranks[name])
            parts = {"lora_A": A, "lora_B": B, "scale_multiplier": layer.scale_multiplier}
            for part, tensor in parts.items():
                if tensor is None:
                    continue
                found = stored.pop(tensor_name(self.adapted, name, part), None)
                if found is None or not found.equal(tensor.detach().cpu()):
                    raise ArtifactError(f"search: {part} of {name} as stored is not the trained one")
        if stored:
            raise ArtifactError(f"search: {min(stored)} is stored and is no part of the sub-adapter")

    @cached_property
    def _records(self) -> list[Record]:
        """Return the records to evaluate on, in one seeded order; none for a searcher that asks nothing of them.

        Where examples are made of them, as in training, those are left out that are left out in training.
        """
        if not self.searcher.needs_records():
            return []
        data = self.inputs.data
        records = data.records("data", self.section.data) if self.section.data else data.training_records()[1]
        Random(self.inputs.seed_for("proxy")).shuffle(records)
        if self.section.metric == "loss" or self.searcher.needs_gradients():
            return [record for record, size in zip(records, self._encoded(records).sizes, strict=True) if size]
        return records

    def _measure(self, config: RankConfig, records: slice) -> list[RecordValue]:
        """Evaluate the metric of one rank configuration on some records, in all processes together."""
        processes = self.inputs.processes
        processes.broadcast(json.dumps({"ranks": config.ranks, "start": records.start, "stop": records.stop}))
        shares = [json.loads(own) for own in processes.gather(json.dumps(self._own_values(config, records)))]
        values = [RecordValue(*value) for turn in zip_longest(*shares) for value in turn if value is not None]
        if not all(math.isfinite(value.total) for value in values):
            raise StageError(f"the {self.section.metric} of ranks {config.ranks} is not finite")
        return values

    def _differentiate(self, samples: int | None) -> list[list[float]]:
        """Compute `sqft.ranks.Evaluate.first_order` on the first records, in all processes together."""
        processes = self.inputs.processes
        processes.broadcast(json.dumps({"ranks": None, "start": 0, "stop": samples}))
        shares = [json.loads(own) for own in processes.gather(json.dumps(self._own_changes(slice(samples))))]
        if not all(math.isfinite(change) for changes, _ in shares for group in changes for change in group):
            raise StageError("the gradients of the loss are not finite")
        labels = sum(count for _, count in shares)
        groups = zip(*(changes for changes, _ in shares), strict=True)
        return [[math.fsum(own) / labels for own in zip(*group, strict=True)] for group in groups]

    def _take_part(self) -> Report:
        """Measure this process's share of what the first one asks for, until it asks for no more."""
        processes = self.inputs.processes
        while (asked := processes.receive()) != NO_MORE:
            trial = json.loads(asked)
            records = slice(trial["start"], trial["stop"])
            if trial["ranks"] is None:
                processes.gather(json.dumps(self._own_changes(records)))
            else:
                processes.gather(json.dumps(self._own_values(RankConfig(tuple(trial["ranks"])), records)))
        return {}

    def _own_values(self, config: RankConfig, records: slice) -> list[RecordValue]:
        """Return the values of this process's share of the records."""
        section, model, tokenizer = self.section, self.adapted.model, self.adapted.tokenizer
        own = self._own(records)
        if not own:
            return []
        self.adapted.set_ranks(config)
        with cached_effective_weights(model):
            if section.metric == "exact_match":
                asked = section.answer, section.max_new_tokens, section.batch_size
                found = exact_match(model, tokenizer, own, *asked, silent, section.tolerance)
                return [RecordValue(float(answer["right"]), 1) for answer in found["predictions"]]
            encoded = self._encoded(own)
            pad_id = cast(int, tokenizer.pad_token_id)
            losses = iter(example_losses(self._loss(), encoded.examples, section.batch_size, pad_id, silent))
            return [_record_value(list(islice(losses, size))) for size in encoded.sizes]

    def _own_changes(self, records: slice) -> tuple[list[list[float]], int]:
        """Return the sum of the changes, by gradients, of this process's share of the records, and their labels."""
        own = self._own(records)
        examples = self._encoded(own).examples if own else []
        return first_order_changes(self.adapted, self._loss(), examples, self.inputs.track)

    def _loss(self) -> CompletionLoss:
        """Return the loss of the model, with the logits in memory that training had there."""
        return CompletionLoss(self.adapted.model, self._finetune.loss_chunk)

    @property
    def _finetune(self) -> Finetune:
        return section_of(self.inputs.plan.step("finetune"), Finetune)

    def _own(self, records: slice) -> list[Record]:
        """Return this process's share of some records: every n-th one, of n processes."""
        return self._records[records][self.inputs.processes.rank :: self.inputs.processes.count]

    def _encoded(self, records: list[Record]) -> Encoded:
        """Encode records as training does."""
        finetune, tokenizer = self._finetune, self.adapted.tokenizer
        return Tokenization(tokenizer, finetune.max_length, finetune.loss_on, finetune.truncation).encode(records)


class CachedEvaluator:
    """`sqft.ranks.Evaluate` on the first records of a validation set. What was evaluated is appended to a file before
    it is returned; records that are asked for again with a configuration, by a later run too, are taken from there.

    Args:
        file: where values are stored, and read from when an earlier run left some.
        space: the rank configurations that may be asked for.
        records: the validation set, in a fixed order.
        measure: evaluates a configuration on those of the records that are in a slice.
        label: the searcher, as error messages name it.
        training: returns the steps of the training.
        differentiate: computes `first_order` on so many records, or on all; None if the searcher says that it needs
            no gradients.
    """

    def __init__(
        self,
        file: Path,
        space: SearchSpace,
        records: Sequence[Record],
        measure: Callable[[RankConfig, slice], list[RecordValue]],
        label: str,
        training: Callable[[], Sequence[TrainingStep]],
        differentiate: Differentiate | None = None,
    ) -> None:
        self.file, self.space, self.records, self.measure, self.label = file, space, records, measure, label
        self.training, self.differentiate = training, differentiate
        self.known: dict[RankConfig, list[RecordValue]] = {}
        self.trials: list[dict[str, Any]] = []
        self.seconds = 0.0
        self.earlier: dict[RankConfig, list[tuple[int, float]]] = {}
        """Evaluations of an earlier run that were not yet asked for again: up to which sample, and their seconds."""
        if file.is_file():
            self._resume()

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float:
        return _metric(self.each(choice, samples))

    def each(self, choice: RankConfig, samples: int | None = None) -> Sequence[RecordValue]:
        """Return the values of the first records, one by one; see `sqft.ranks.Evaluate`."""
        checks.check_question(self.label, self.space, choice, samples)
        self._check_records("an evaluation")
        count = min(samples or len(self.records), len(self.records))
        values = self.known.get(choice, [])
        earlier = self.earlier.get(choice, [])
        while earlier and count >= earlier[0][0]:
            self.seconds += earlier.pop(0)[1]
        if count > len(values):
            start = time.monotonic()
            new = self.measure(choice, slice(len(values), count))
            seconds = time.monotonic() - start
            values = self.known[choice] = values + new
            trial = _trial(choice, values, new)
            self.file.parent.mkdir(exist_ok=True)
            with self.file.open("a") as stream:
                stream.write(_line(trial | {"seconds": seconds}))
            self.trials.append(trial)
            self.seconds += seconds
            log.info("trial %d: %.4f on %d samples", len(self.trials), _metric(values), count)
        return values[:count]

    def within(self, seconds: float | None) -> bool:
        """Return whether the evaluations took less time so far; see `sqft.ranks.Evaluate`."""
        return seconds is None or self.seconds < seconds

    def first_order(self, samples: int | None = None) -> Sequence[Sequence[float]]:
        """Return the changes of the loss by gradients; see `sqft.ranks.Evaluate`. They are computed each time."""
        checks.check_question_of_gradients(self.label, self.differentiate is not None, samples)
        self._check_records("gradients")
        return cast(Differentiate, self.differentiate)(samples)

    def _check_records(self, what: str) -> None:
        if not self.records:
            raise StageError(
                f"{self.label} asked for {what}, but search.data is not given, or it says `evaluates = False`"
            )

    def value_on_most_samples(self, config: RankConfig) -> float | None:
        """Return a configuration's value on the most samples it was evaluated on; None when it never was."""
        return _metric(self.known[config]) if config in self.known else None

    def front(self, config: RankConfig) -> list[dict[str, object]]:
        """Return the Pareto front of value against parameters, fewest first: of what was evaluated on as many samples
        as `config`, all that has a higher value than everything smaller."""
        count = len(self.known.get(config, ()))
        peers = [(self.space.parameters(c), -_metric(v), c.ranks) for c, v in self.known.items() if len(v) == count]
        front: list[dict[str, object]] = []
        best = math.inf
        for parameters, loss, ranks in sorted(peers):
            if loss < best:
                best = loss
                front.append({"ranks": ranks, "parameters": parameters, "value": -loss})
        return front

    def write(self, file: Path) -> None:
        """Write all trials, without their time."""
        if self.trials:
            write_text(file, "".join(map(_line, self.trials)))

    def _resume(self) -> None:
        """Take the values of an earlier run from the file, and drop a last line that a kill cut short."""
        lines = []
        for line in self.file.read_text().splitlines(keepends=True):
            try:
                trial = json.loads(line)
                config, seconds = RankConfig(tuple(trial["ranks"])), float(trial.pop("seconds"))
                new = list(map(RecordValue, trial["totals"], trial["weights"]))
            except (ValueError, KeyError, TypeError):
                break
            self.known[config] = self.known.get(config, []) + new
            self.earlier.setdefault(config, []).append((len(self.known[config]), seconds))
            self.trials.append(trial)
            lines.append(line.rstrip("\n") + "\n")
        write_text(self.file, "".join(lines))


def _metric(values: Sequence[RecordValue]) -> float:
    return sum(value.total for value in values) / sum(value.weight for value in values)


def _record_value(losses: Sequence[tuple[float, int]]) -> RecordValue:
    """Return the value of a record by the losses of its examples, and their labels."""
    return RecordValue(-sum(loss for loss, _ in losses), sum(labels for _, labels in losses))


def _trial(config: RankConfig, values: Sequence[RecordValue], new: Sequence[RecordValue]) -> dict[str, Any]:
    """Return a line of `TRIALS`, by its names."""
    totals, weights = map(list, zip(*new, strict=True))
    trial = {"ranks": list(config.ranks), "samples": len(values), "value": _metric(values)}
    return trial | {"totals": totals, "weights": weights}


def _line(trial: Mapping[str, Any]) -> str:
    return json.dumps(trial) + "\n"
