"""Show the data of a recipe as the model will see them: tokens, where the loss is computed, lengths, what is cut."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby, islice
from typing import Any

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from sqft.components.kinds import Searcher
from sqft.data.collators import pack
from sqft.data.encoding import IGNORED, Encoded, Example, Tokenization, encode_prompts, truncate_prompts
from sqft.data.records import Record
from sqft.data.windows import text_windows
from sqft.errors import SqftError
from sqft.modeling.loading import load_tokenizer
from sqft.modeling.loading.transformers_io import quiet_transformers
from sqft.planning.plan import Plan
from sqft.recipe.measures import Perplexity
from sqft.recipe.sections import Evaluate, Finetune, Search
from sqft.stages.inputs import StepData
from sqft.utils.digests import Digests


@dataclass(frozen=True)
class Piece:
    """A piece of text; `learned` if the loss is computed on it, or an answer is compared with it."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Preview:
    """One data set: its path in the recipe, its first examples, and facts such as lengths, each with a label.

    `titles` say which record each example is of; `notes` what a user should know before training.
    """

    place: str
    examples: list[list[Piece]]
    facts: dict[str, str]
    titles: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


MOST_EXAMPLES = 8
"""Of one record, no more examples than these are shown: a long text has very many."""

Maker = Callable[[str], Preview]
"""Reads a data set and makes its preview, given its place in the recipe."""


def previews(plan: Plan, count: int, sections: Sequence[str] = ()) -> Iterator[Preview]:
    """Yield a preview of every data set that sqft itself reads for a recipe, with its first `count` examples.

    With `sections`, only those paths of the recipe, and all below them: "finetune.validation", or all of "finetune".

    Raises:
        SqftError: when the recipe reads no data in one of `sections`.
        DataError: naming a record without a token to learn from, or without a prompt.
        ModelError: when the model has no tokenizer that can be loaded.
    """
    makers = _makers(plan, count)
    for name in sections:
        if not any(_is_below(place, name) for place in makers):
            raise SqftError(
                f"this recipe reads no data in '{name}'; it reads data in {', '.join(makers) or 'no section'}"
            )
    for place, make in makers.items():
        if not sections or any(_is_below(place, name) for name in sections):
            with quiet_transformers():  # not across the yield: what happens between two previews is the caller's
                preview = make(place)
            yield preview


def _is_below(place: str, name: str) -> bool:
    return f"{place}.".startswith(f"{name}.")


def _makers(plan: Plan, count: int) -> dict[str, Maker]:
    """Return for each data set of the recipe, by its place, in the order of the steps, what makes its preview.

    Makers read through the stages' own `StepData`; nothing but the tokenizer is read before they are called.
    """
    tokenizer, digests = load_tokenizer(plan.model_spec), Digests()
    show = _Display(tokenizer, count, plan.source.size("max_position_embeddings") or 1 << 30)
    training: _TrainingData | None = None
    makers: dict[str, Maker] = {}
    for step in plan.steps:
        data, section = StepData(plan, step, digests), step.section
        if "calibration" in step.files:
            makers.setdefault("calibration.data", partial(_calibration, show, data))
        if isinstance(section, Finetune):
            training = _TrainingData(data, section, tokenizer)
            makers |= _of_finetune(show, training)
        elif isinstance(section, Search) and step.component(Searcher).needs_records():
            makers |= _of_search(show, data, section, training)
        elif isinstance(section, Evaluate):
            makers |= _of_evaluate(show, data, section)
    return makers


def _calibration(show: _Display, data: StepData, place: str) -> Preview:
    return show.windows(place, data.calibration(show.tokenizer))


def _text(show: _Display, data: StepData, role: str, text: Perplexity, place: str) -> Preview:
    preview = show.text(place, text_windows(data.step.files[role], show.tokenizer, text.tokens, text.length))
    preview.notes.extend(note for note in data.plan.notes if note.startswith(f"evaluate.{role}: "))
    return preview


def _of_finetune(show: _Display, training: _TrainingData) -> dict[str, Maker]:
    section = training.section
    makers: dict[str, Maker] = {f"finetune.{role}": partial(training.preview, show, role) for role in section.data_sets}
    if len(section.data_sets) > 1:
        makers["finetune.data"] = partial(training.preview_of_all, show)
    if section.holdout:
        makers["finetune.holdout"] = lambda place: training.part(show, place, training.held_out())
    if how := section.validation:
        makers["finetune.validation"] = lambda place: training.learned(
            show, place, training.data.records("validation", how)
        )
    return makers


def _of_search(show: _Display, data: StepData, section: Search, training: _TrainingData | None) -> dict[str, Maker]:
    assert training is not None
    how = section.data

    def records() -> list[Record]:
        return data.records("data", how) if how else training.held_out()

    place = "search.data" if how else "finetune.holdout"
    if section.metric == "loss":
        return {place: lambda place: training.learned(show, place, records())}
    return {place: lambda place: show.asked(place, records(), section.max_new_tokens)}


def _of_evaluate(show: _Display, data: StepData, section: Evaluate) -> dict[str, Maker]:
    makers: dict[str, Maker] = {}
    for role, text in section.texts.items():
        makers[f"evaluate.{role}".removesuffix(".text")] = partial(_text, show, data, role, text)
    if match := section.exact_match:
        makers["evaluate.exact_match"] = lambda place: show.asked(
            place, data.records("exact_match.data", match.data), match.max_new_tokens
        )
    return makers


class _TrainingData:
    """The data sets that `finetune` trains on, read and encoded once, when they are first asked for."""

    def __init__(self, data: StepData, section: Finetune, tokenizer: PreTrainedTokenizerBase) -> None:
        self.data, self.section = data, section
        self.tokenization = Tokenization(tokenizer, section.max_length, section.loss_on, section.truncation)
        self.sets = cache(data.training_sets)
        self.encoded = cache(self._encoded)

    def _encoded(self, role: str) -> Encoded:
        """Return one data set as examples. Of several, training accepts one of which nothing is left."""
        encoded = self.tokenization.encode_part(self.sets()[role][0])
        if len(self.section.data_sets) == 1:
            self.tokenization.check_some_left(encoded)
        return encoded

    def held_out(self) -> list[Record]:
        """Return the records that are held out of all data sets."""
        return [record for _, held in self.sets().values() for record in held]

    def preview(self, show: _Display, role: str, place: str) -> Preview:
        """Make the preview of one data set."""
        records, held = self.sets()[role]
        data, alone = self.section.data_sets[role], len(self.section.data_sets) == 1
        facts = {"records": str(len(records))}
        if held:
            facts["held out"] = f"{len(held)} records more"
        if data.weight != 1:
            facts["each comes"] = f"{data.weight:g} times an epoch"
        encoded = self.encoded(role)
        return show.encoded(place, encoded, {**facts, **show.facts(encoded), **self._packed(encoded, alone)})

    def preview_of_all(self, show: _Display, place: str) -> Preview:
        """Make the preview of all data sets together, each as often as its weight says.

        Raises:
            DataError: when nothing is left of any.
        """
        parts = [self.encoded(role) for role in self.section.data_sets]
        examples = [example for part in parts for example in part.examples]
        sizes, dropped = [n for part in parts for n in part.sizes], sum(part.dropped for part in parts)
        mixed = Encoded(examples, sizes, sum(part.rewritten for part in parts), dropped=dropped)
        self.tokenization.check_some_left(mixed)
        records = sum(len(training) for training, _ in self.sets().values())
        facts = {"records": f"{records}, of {len(parts)} data sets", **show.facts(mixed), **self._packed(mixed)}
        return Preview(place, [], facts)

    def learned(self, show: _Display, place: str, records: Sequence[Record]) -> Preview:
        """Make the preview of records in the form that training has them.

        Raises:
            DataError: when nothing is left of them.
        """
        return self.part(show, place, records, needed=True)

    def part(self, show: _Display, place: str, records: Sequence[Record], needed: bool = False) -> Preview:
        """Make the same preview of records of which, unless they are needed, nothing may be left."""
        encoded = self.tokenization.encode_part(records)
        if needed:
            self.tokenization.check_some_left(encoded)
        return show.encoded(place, encoded, {"records": str(len(records)), **show.facts(encoded)})

    def _packed(self, encoded: Encoded, wanted: bool = True) -> dict[str, str]:
        length = self.section.max_length
        if not (wanted and self.section.packing):
            return {}
        return {"packed": f"{len(pack(encoded.examples, length))} rows of {length} tokens"}


class _Display:
    """Makes text of tokens.

    Args:
        tokenizer: the model's.
        count: examples to show of each data set.
        context: tokens that the model can attend to.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, count: int, context: int) -> None:
        self.tokenizer, self.count, self.context = tokenizer, count, context

    def windows(self, place: str, windows: Tensor) -> Preview:
        """Make the preview of calibration windows [samples, length]."""
        shown = [[Piece(self._text(window), False)] for window in windows[: self.count]]
        samples, length = windows.shape
        return Preview(place, shown, {"windows": f"{samples} of {length} tokens, {windows.numel()} in all"})

    def text(self, place: str, windows: Sequence[Tensor]) -> Preview:
        """Make the preview of a text whose perplexity is measured; nothing predicts a window's first token."""
        shown = [
            [Piece(self._text(window[:1]), False), Piece(self._text(window[1:]), True)]
            for window in windows[: self.count]
        ]
        return Preview(
            place, shown, {"windows": str(len(windows)), "tokens": _range([len(window) for window in windows])}
        )

    def asked(self, place: str, records: Sequence[Record], max_new_tokens: int) -> Preview:
        """Make the preview of records whose prompts the model is to complete."""
        prompts, cut = truncate_prompts(encode_prompts(records, self.tokenizer), self.context, max_new_tokens)
        shown = [[Piece(self._text(ids), False), Piece(wanted, True)] for ids, wanted, *_ in prompts[: self.count]]
        facts = {"records": str(len(records)), "tokens of a prompt": _range([len(prompt.ids) for prompt in prompts])}
        return Preview(place, shown, {**facts, "cut to fit": f"{cut} prompts"})

    def encoded(self, place: str, encoded: Encoded, facts: dict[str, str]) -> Preview:
        """Make the preview of examples: of the first records, as runs of tokens with loss and without."""
        shown, titles, examples = [], [], iter(encoded.examples)
        for record, size in enumerate(encoded.sizes[: self.count], 1):
            for number, example in enumerate(islice(examples, size), 1):
                if number <= MOST_EXAMPLES:
                    runs = groupby(zip(example.input_ids, _learns(example), strict=True), key=lambda pair: pair[1])
                    shown.append([Piece(self._text([token for token, _ in run]), learned) for learned, run in runs])
                    titles.append(f"record {record}" + (f", example {number} of {size}" if size > 1 else ""))
        notes = [said for said in (encoded.note(), encoded.warning()) if said]
        return Preview(place, shown, facts, titles, notes)

    def facts(self, encoded: Encoded) -> dict[str, str]:
        """Return how many examples there are, how long, how much of them is learnt, and in which tokens answers end."""
        ends = ", ".join(f"{count} ({self._text([end])})" for end, count in encoded.ends.most_common())
        return {
            "examples": str(len(encoded.examples)),
            "tokens": _range([len(example.input_ids) for example in encoded.examples]),
            "tokens with loss": _range([sum(_learns(example)) for example in encoded.examples]),
            "answers": f"{encoded.answers} learnt; to their end: {ends or 'none'}",
            "cut to fit": f"{encoded.truncated} examples, {encoded.tokens_cut} tokens",
            **({"left out": f"{encoded.dropped} examples, too long"} if encoded.dropped else {}),
        }

    def _text(self, tokens: Any) -> str:
        text: str = self.tokenizer.decode(tokens)
        return text


def _learns(example: Example) -> list[bool]:
    """Return for each token whether the loss is computed on it; nothing predicts the first."""
    return [False, *(label != IGNORED for label in example.labels[1:])]


def _range(sizes: Sequence[int]) -> str:
    if not (ordered := sorted(sizes)):
        return "none"
    return f"{ordered[0]} to {ordered[-1]}, median {statistics.median(ordered):g}, {sum(ordered)} in all"
