"""The data of a recipe as the model will see them: tokens, what carries loss, lengths, what is cut."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqft.data.batches import pack
from sqft.data.prompts import IGNORED, Example, encode_all, prompts_of
from sqft.data.records import records_of
from sqft.modeling.load import source_tokenizer
from sqft.plan import Plan
from sqft.recipe import Evaluate, Finetune, Search
from sqft.sections import Data


@dataclass(frozen=True)
class Piece:
    """A run of text; `learned` where it carries loss, or is what an answer is compared with."""

    text: str
    learned: bool


@dataclass(frozen=True)
class Preview:
    """One data set: its place in the recipe, its first examples, and numbers by what they say."""

    place: str
    examples: list[list[Piece]]
    facts: dict[str, str]


def previews(plan: Plan, count: int) -> Iterator[Preview]:
    """Every data set of records that a recipe names, with its first `count` examples.

    Raises:
        DataError: naming a record that leaves nothing to learn from or to ask.
        StageError: when the model has no tokenizer that can be loaded.
    """
    tokenizer = source_tokenizer(plan.source, plan.recipe.model.trust_remote_code)
    steps = {step.name: step for step in plan.steps}
    if "finetune" in steps:
        section = steps["finetune"].section
        assert isinstance(section, Finetune)
        for role, data in section.data_sets.items():
            records = records_of(steps["finetune"].files[role], data)
            encoded = encode_all(records, tokenizer, section.max_length, section.loss_on)
            facts = {"records": str(len(records)), **_lengths(encoded.examples)}
            facts["cut to fit"] = f"{encoded.truncated} examples, {encoded.tokens_cut} tokens"
            if data.weight != 1:
                facts["each comes"] = f"{data.weight:g} times an epoch"
            if section.packing:
                rows = len(pack(encoded.examples, section.max_length))
                facts["packed"] = f"{rows} rows of {section.max_length} tokens"
            yield Preview(f"finetune.{role}", [_pieces(e, tokenizer) for e in encoded.examples[:count]], facts)
    asked: list[tuple[str, str, Data]] = []
    if "search" in steps and "data" in steps["search"].files:
        search = steps["search"].section
        assert isinstance(search, Search) and search.data
        asked.append(("search", "data", search.data))
    evaluate = next((step for step in plan.steps if step.stage == "evaluate"), None)
    if evaluate and isinstance(evaluate.section, Evaluate) and evaluate.section.exact_match:
        asked.append((evaluate.name, "exact_match", evaluate.section.exact_match.data))
    for step, role, how in asked:
        records = records_of(steps[step].files[role], how)
        if any("text" in record for record in records):  # a search that looks at the loss asks nothing
            continue
        prompts = prompts_of(records, tokenizer)
        shown = [[Piece(tokenizer.decode(ids), False), Piece(wanted, True)] for ids, wanted in prompts[:count]]
        sizes = [len(ids) for ids, _ in prompts]
        yield Preview(
            f"{step.partition(':')[0]}.{role}",
            shown,
            {"records": str(len(records)), "tokens of a prompt": _range(sizes)},
        )


def _pieces(example: Example, tokenizer: Any) -> list[Piece]:
    pairs = zip(example.input_ids, example.labels, strict=True)
    runs = groupby(pairs, key=lambda pair: pair[1] != IGNORED)
    return [Piece(tokenizer.decode([token for token, _ in run]), learned) for learned, run in runs]


def _lengths(examples: Sequence[Example]) -> dict[str, str]:
    labels = [sum(label != IGNORED for label in example.labels) for example in examples]
    return {
        "examples": str(len(examples)),
        "tokens": _range([len(example.input_ids) for example in examples]),
        "tokens with loss": _range(labels),
    }


def _range(sizes: Sequence[int]) -> str:
    ordered = sorted(sizes)
    return f"{ordered[0]} to {ordered[-1]}, median {statistics.median(ordered):g}, {sum(ordered)} in all"
