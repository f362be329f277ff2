"""Show the data of a recipe as the model will see them: tokens, where the loss is computed, lengths, what is cut."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import groupby
from typing import Any

from sqft.components.kinds import Searcher
from sqft.data.collators import pack
from sqft.data.encoding import IGNORED, Encoded, Example, Tokenization, encode_prompts, truncate_prompts
from sqft.data.records import Record
from sqft.data.windows import text_windows
from sqft.errors import SqftError
from sqft.modeling.loading import load_tokenizer
from sqft.modeling.loading.transformers_io import quiet_transformers
from sqft.planning.plan import Plan
from sqft.recipe.sections import Evaluate, ExactMatch, Finetune, Search
from sqft.stages.inputs import StepData
from sqft.utils.digests import Digests


@dataclass(frozen=True)
class Piece:
    """A piece of text; `learned` if the loss is computed on it, or an answer is compared with it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Preview:
    """One data set: its path in the recipe, its first examples, and facts such as lengths, each with a label."""

    place: str
    examples: list[list[Piece]]
    facts: dict[str, str]


def previews(plan: Plan, count: int, sections: Sequence[str] = ()) -> Iterator[Preview]:
    """Yield a preview of every data set that sqft itself reads for a recipe, with its first `count` examples.

    With `sections`, only those paths of the recipe, and all below them: "finetune.validation", or all of "finetune".

    Raises:
        SqftError: when the recipe reads no data in one of `sections`.
        DataError: naming a record without a token to learn from, or without a prompt.
        StageError: when the model has no tokenizer that can be loaded.
    """
    found = _PreviewBuilder(plan, count).found
    for name in sections:
        if not any(_below(place, name) for place in found):
            raise SqftError(
                f"this recipe reads no data in '{name}'; it reads data in {', '.join(found) or 'no section'}"
            )
    for place, look in found.items():
        if not sections or any(_below(place, name) for name in sections):
            with quiet_transformers():  # not across the yield: what happens between two previews is the caller's
                preview = look(place)
            yield preview


def _below(place: str, name: str) -> bool:
    return f"{place}.".startswith(f"{name}.")


class _PreviewBuilder:
    """For each data set of the recipe, in the order of its steps, a function that makes its preview.

    The functions read the data through the stages' own `StepData`; nothing is read before they are called.
    """

    def __init__(self, plan: Plan, count: int) -> None:
        self.plan, self.count = plan, count
        self.tokenizer = load_tokenizer(plan.model_spec)
        self.found: dict[str, Callable[[str], Preview]] = {}
        self.training_sets: Callable[[], dict[str, tuple[list[Record], list[Record]]]]
        digests = Digests()
        for step in plan.steps:
            data = StepData(plan, step, digests)
            section = step.section
            if "calibration" in step.files:
                self.found.setdefault("calibration.data", partial(self._calibration, data))
            if isinstance(section, Finetune):
                self._finetune(data, section)
            elif isinstance(section, Search):
                self._search(data, section)
            elif isinstance(section, Evaluate):
                self._evaluate(data, section)

    # -- sections -------------------------------------------------------------------------------

    def _finetune(self, data: StepData, section: Finetune) -> None:
        self.tuning = section
        self.training_sets = cache(data.training_sets)
        self.encoded = cache(lambda role: self._encoded(self.training_sets()[role][0]))
        for role in section.data_sets:
            self.found[f"finetune.{role}"] = partial(self._training, role)
        if len(section.data_sets) > 1:
            self.found["finetune.data"] = self._mixed
        if section.holdout:
            self.found["finetune.holdout"] = lambda place: self._learned(place, self._held())
        if section.validation:
            read = partial(data.records, "validation", section.validation)
            self.found["finetune.validation"] = lambda place: self._learned(place, read())

    def _search(self, data: StepData, section: Search) -> None:
        searcher = data.step.components.get("searcher")
        evaluates = searcher and isinstance(searcher.component, Searcher) and searcher.component.evaluates
        if not evaluates or (section.metric == "loss" and not section.data):
            return  # held-out records are already shown in the form that the loss uses
        place, read = "finetune.holdout", self._held
        if section.data:
            place, read = "search.data", partial(data.records, "data", section.data)
        if section.metric == "loss":
            self.found[place] = lambda place: self._learned(place, read())
        else:
            self.found[place] = lambda place: self._asked(place, read(), section)

    def _evaluate(self, data: StepData, section: Evaluate) -> None:
        if text := section.perplexity:
            windows = partial(
                text_windows, data.step.files["perplexity.text"], self.tokenizer, text.tokens, text.length
            )
            self.found["evaluate.perplexity"] = lambda place: self._text(place, windows())
        if match := section.exact_match:
            read = partial(data.records, "exact_match.data", match.data)
            self.found["evaluate.exact_match"] = lambda place: self._asked(place, read(), match)

    # -- previews -------------------------------------------------------------------------------

    def _calibration(self, data: StepData, place: str) -> Preview:
        windows = data.calibration(self.tokenizer)
        shown = [[Piece(self.tokenizer.decode(window), False)] for window in windows[: self.count]]
        samples, length = windows.shape
        return Preview(place, shown, {"windows": f"{samples} of {length} tokens, {windows.numel()} in all"})

    def _training(self, role: str, place: str) -> Preview:
        records, held = self.training_sets()[role]
        data, alone = self.tuning.data_sets[role], len(self.tuning.data_sets) == 1
        facts = {"records": str(len(records))}
        if held:
            facts["held out"] = f"{len(held)} records more"
        if data.weight != 1:
            facts["each comes"] = f"{data.weight:g} times an epoch"
        encoded = self.encoded(role)
        return Preview(place, self._pieces(encoded), {**facts, **self._facts(encoded, rows=alone)})

    def _mixed(self, place: str) -> Preview:
        """Preview all data sets together, each as often as its weight says."""
        parts = [self.encoded(role) for role in self.tuning.data_sets]
        examples = [example for part in parts for example in part.examples]
        mixed = Encoded(examples, sum(p.truncated for p in parts), sum(p.tokens_cut for p in parts))
        records = sum(len(training) for training, _ in self.training_sets().values())
        return Preview(place, [], {"records": f"{records}, of {len(parts)} data sets", **self._facts(mixed, rows=True)})

    def _learned(self, place: str, records: Sequence[Record]) -> Preview:
        encoded = self._encoded(records)
        return Preview(place, self._pieces(encoded), {"records": str(len(records)), **self._facts(encoded)})

    def _asked(self, place: str, records: Sequence[Record], section: Search | ExactMatch) -> Preview:
        window = self.plan.source.size("max_position_embeddings") or 1 << 30
        prompts, cut = truncate_prompts(encode_prompts(records, self.tokenizer), window, section.max_new_tokens)
        shown = [
            [Piece(self.tokenizer.decode(ids), False), Piece(wanted, True)] for ids, wanted in prompts[: self.count]
        ]
        facts = {"records": str(len(records)), "tokens of a prompt": _range([len(ids) for ids, _ in prompts])}
        return Preview(place, shown, {**facts, "cut to fit": f"{cut} prompts"})

    def _text(self, place: str, windows: Sequence[Any]) -> Preview:
        decode = self.tokenizer.decode
        shown = [[Piece(decode(w[:1]), False), Piece(decode(w[1:]), True)] for w in windows[: self.count]]
        return Preview(place, shown, {"windows": str(len(windows)), "tokens": _range([len(w) for w in windows])})

    # -- pieces ---------------------------------------------------------------------------------

    def _held(self) -> list[Record]:
        return [record for _, held in self.training_sets().values() for record in held]

    def _encoded(self, records: Sequence[Record]) -> Encoded:
        return Tokenization(self.tokenizer, self.tuning.max_length, self.tuning.loss_on).encode(records)

    def _facts(self, encoded: Encoded, rows: bool = False) -> dict[str, str]:
        facts = {
            "examples": str(len(encoded.examples)),
            "tokens": _range([len(example.input_ids) for example in encoded.examples]),
            "tokens with loss": _range([sum(_learns(example)) for example in encoded.examples]),
            "cut to fit": f"{encoded.truncated} examples, {encoded.tokens_cut} tokens",
        }
        if rows and self.tuning.packing:
            length = self.tuning.max_length
            facts["packed"] = f"{len(pack(encoded.examples, length))} rows of {length} tokens"
        return facts

    def _pieces(self, encoded: Encoded) -> list[list[Piece]]:
        shown = []
        for example in encoded.examples[: self.count]:
            runs = groupby(zip(example.input_ids, _learns(example), strict=True), key=lambda pair: pair[1])
            shown.append([Piece(self.tokenizer.decode([t for t, _ in run]), learned) for learned, run in runs])
        return shown


def _learns(example: Example) -> list[bool]:
    """Return for each token whether the loss is computed on it; nothing predicts the first."""
    return [False, *(label != IGNORED for label in example.labels[1:])]


def _range(sizes: Sequence[int]) -> str:
    ordered = sorted(sizes)
    return f"{ordered[0]} to {ordered[-1]}, median {statistics.median(ordered):g}, {sum(ordered)} in all"
