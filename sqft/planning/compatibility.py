"""Check whether the choices of a recipe fit one another and the model's layers. No torch.

Each check yields problems with their path in the recipe, and raises nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.safetensors import read_object
from sqft.components import checks
from sqft.components.kinds import Adapter, Component, Exporter, Merger, Quantizer
from sqft.errors import Problem, SqftError
from sqft.planning.plan import ResolvedComponent
from sqft.recipe.sections import Finetune, Sparsify
from sqft.types import BaseKind, LinearShape
from sqft.utils.globs import covering

C = TypeVar("C", bound=Component)

POLYNOMIAL_END = 1e-7
"""The learning rate at which transformers' polynomial schedule ends."""


def check_pattern(section: Sparsify, pruned: Sequence[LinearShape]) -> Iterator[Problem]:
    """Check that an N:M pattern divides the inputs of every pruned layer, and that no allocator is named beside it."""
    pattern = section.pattern
    if pattern.sparsity is None:
        return
    if section.allocator != Sparsify.model_fields["allocator"].default:
        yield Problem(
            "sparsify.allocator",
            f"cannot be used with the pattern '{pattern}', which gives every layer the same sparsity; remove it",
        )
    offending = [layer for layer in pruned if layer.in_features % pattern.of]
    if offending:
        yield Problem(
            "sparsify.pattern",
            f"'{pattern}' needs layers whose inputs are a multiple of {pattern.of}; {offending[0].name} has "
            f"{offending[0].in_features} ({len(offending)} such layers): choose another pattern"
            f"{_or_exclude(offending, pruned, section.exclude)}",
        )


def check_grid(
    quantizer: ResolvedComponent[Quantizer], layers: Sequence[LinearShape], exclude: Sequence[str]
) -> Iterator[Problem]:
    """Check that every layer to quantize fits the quantizer's grid; `exclude` is what the recipe leaves out already."""
    place = "quantize.quantizer"
    try:
        reasons = [(layer, reason) for layer in layers if (reason := quantizer.component.incompatibility(layer))]
    except (Exception, SystemExit) as error:  # a plugin's code
        yield Problem(place, f"{quantizer.label} raised {error!r}")
        return
    if reasons:
        layer, reason = reasons[0]
        remedy = _or_exclude([layer for layer, _ in reasons], layers, exclude)
        yield Problem(place, f"{layer.name}: {reason} ({len(reasons)} such layers{remedy})")


def check_dense(quantizer: ResolvedComponent[Quantizer], sparsify: Sparsify | None) -> tuple[bool, list[Problem]]:
    """Return whether the quantizer needs the weight from before pruning, and what is wrong with that."""
    place = "quantize.quantizer"
    try:
        option = option_behind(quantizer.component, place, lambda one: one.needs_dense())
    except (Exception, SystemExit) as error:  # a plugin's code
        return False, [Problem(place, f"{quantizer.label} raised {error!r}")]
    if option is None or sparsify is not None:
        return option is not None, []
    message = "would make up for pruned weights, but this recipe prunes none; remove this, or add sparsify"
    return True, [Problem(option, f"'{quantizer.component.name}' {message}")]


def _or_exclude(offending: Sequence[LinearShape], layers: Sequence[LinearShape], exclude: Sequence[str]) -> str:
    """Return the words that tell a user to exclude these layers, beside what is excluded, and none of the others in
    `layers`; empty when there are no others."""
    names = {layer.name for layer in offending}
    others = [layer.name for layer in layers if layer.name not in names]
    return f'; or set "exclude": {json.dumps(covering(names, others, exclude))}' if others else ""


def check_blocks_alike(linears: Iterable[LinearShape], chosen: Sequence[LinearShape]) -> Iterator[Problem]:
    """Check that the same layers are quantized in every decoder block that has them."""
    quantized: dict[str, set[bool]] = {}  # blocks may hold other layers than their neighbours
    for layer in linears:
        inner = re.split(r"\.\d+\.", layer.name, maxsplit=1)[-1]
        quantized.setdefault(inner, set()).add(layer in chosen)
    if any(len(answers) > 1 for answers in quantized.values()):
        yield Problem("quantize.include", "differs from block to block, which no checkpoint format can express")


def check_base(
    merger: ResolvedComponent[Merger], kind: BaseKind | None, installed: Sequence[type[Merger]]
) -> Iterator[Problem]:
    """Check that the merger works on the base under the adapters; one whose kind is not known fits."""
    if kind is None or kind in merger.component.bases:
        return
    fitting = sorted(other.name for other in installed if kind in other.bases)
    works = " or ".join(sorted(merger.component.bases))
    yield Problem(
        "finetune.merger",
        f"'{merger.component.name}' works on a {works} base, but this recipe's is {kind}; "
        f"use {' or '.join(fitting) or 'another merger'}, or change the sections before it",
    )


def check_dropout(
    adapter: ResolvedComponent[Adapter], merger: ResolvedComponent[Merger], kind: BaseKind | None
) -> Iterator[Problem]:
    """Check that there is no dropout on the adapter's input where the merged weight is rounded.

    A weight rounded on a grid is no sum of a base and a delta, so the delta's input has no path of its own.
    """
    if kind is not BaseKind.QUANTIZED or not merger.component.merges:
        return
    try:
        place = option_behind(adapter.component, "finetune.adapter", lambda one: bool(one.input_dropout()))
    except (Exception, SystemExit) as error:  # a plugin's code
        yield Problem("finetune.adapter", f"{adapter.label} raised {error!r}")
        return
    if place is not None:
        yield Problem(
            place,
            f"'{merger.component.name}' rounds the merged weight, which allows no dropout on the adapter's input; "
            "set it to 0",
        )


def option_behind(component: C, place: str, asks: Callable[[C], bool]) -> str | None:
    """Return the place of the option with whose default a component, at `place`, no longer asks for something; None
    when it does not ask."""
    if not asks(component):
        return None
    for name in sorted(component.model_fields_set):
        default = type(component).model_fields[name].get_default(call_default_factory=True)
        if not asks(component.model_copy(update={name: default})):
            return f"{place}.options.{name}"
    return place


def check_start(
    section: Finetune,
    merger: ResolvedComponent[Merger] | None,
    kind: BaseKind | None,
    came_quantized: bool,
    quantizer: ResolvedComponent[Quantizer] | None = None,
) -> Iterator[Problem]:
    """Check that the recipe has what `finetune` is to start from.

    Args:
        section: its `base` and `mask` are checked.
        merger: None when it was not found.
        kind: of the base under the adapters; None when it is not known.
        came_quantized: whether the recipe's own model holds codes.
        quantizer: of the recipe, if it quantizes and this was found.
    """
    if kind is None:
        return
    if section.base == "packed" and kind is BaseKind.QUANTIZED:
        yield Problem(
            "finetune.base",
            'only a base of floats can be packed; set this to "codes", which are smaller still, or remove it',
        )
    if section.base in ("codes", "compensated") and kind is not BaseKind.QUANTIZED:
        yield Problem(
            "finetune.base", "there are no codes: this recipe does not quantize; add quantize, or remove this"
        )
    if section.mask == "codes" and not came_quantized:
        yield Problem("finetune.mask", "only a model that is already quantized needs this; remove it")
    elif section.mask == "codes" and merger and not merger.component.merges:
        yield Problem(
            "finetune.mask", f"'{merger.component.name}' does not change the codes and masks nothing; remove this"
        )
    if came_quantized and section.base == "floats" and "base" in section.model_fields_set:
        yield Problem("finetune.base", 'the model has no floats, only codes; remove this, or set it to "codes"')
    if section.base == "compensated":
        yield from _check_compensated(merger, came_quantized, quantizer)


def _check_compensated(
    merger: ResolvedComponent[Merger] | None, came_quantized: bool, quantizer: ResolvedComponent[Quantizer] | None
) -> Iterator[Problem]:
    place = "finetune.base"
    if came_quantized:
        yield Problem(
            place,
            'the model came as codes, without the floats that were rounded to them; remove this, or set it to "codes"',
        )
    elif quantizer and not quantizer.component.gives_compensated:
        yield Problem(
            place,
            f"quantizer '{quantizer.component.name}' does not give the floats that it rounded; set this to "
            '"floats" or "codes"',
        )
    if merger and not merger.component.merges:
        yield Problem(
            place, f"'{merger.component.name}' leaves the codes as they are, whatever was rounded to them; remove this"
        )


def check_space(adapter: ResolvedComponent[Adapter], targets: Sequence[LinearShape]) -> tuple[int, list[Problem]]:
    """Return the parameters that train at the largest ranks, and what is wrong with the adapter's search space."""
    try:
        space = adapter.component.space(targets)
        checks.check_space(adapter.label, targets, space)
    except (Exception, SystemExit) as error:  # a plugin's code
        message = str(error) if isinstance(error, SqftError) else f"{adapter.label} raised {error!r}"
        return 0, [Problem("finetune.adapter", message)]
    largest = {member: max(group.ranks) for group in space.groups for member in group.members}
    return sum(largest.get(t.name, 0) * (t.in_features + t.out_features) for t in targets), []


def check_training(section: Finetune) -> Iterator[Problem]:
    """Check settings of training against one another, and that the trackers are installed."""
    if section.steps and section.warmup_steps >= section.steps:
        yield Problem("finetune.warmup_steps", f"{section.warmup_steps} of {section.steps} steps; warm up in fewer")
    if section.warmup_steps and section.warmup_ratio:
        yield Problem("finetune.warmup_ratio", "has the same effect as warmup_steps; remove one of them")
    if section.schedule == "polynomial" and section.learning_rate <= POLYNOMIAL_END:
        yield Problem("finetune.learning_rate", "a polynomial schedule ends at 1e-7; start above it")
    for name in ("patience", "evaluate_every"):
        if name in section.model_fields_set and getattr(section, name) and section.validation is None:
            yield Problem(f"finetune.{name}", 'there is nothing to evaluate on; add "validation": "….jsonl"')
    for index, name in enumerate(section.report_to):
        if find_spec(name) is None and not (name == "tensorboard" and find_spec("tensorboardX")):
            yield Problem(
                f"finetune.report_to.{index}", f"'{name}' is not installed; pip install {name}, or remove it here"
            )


def check_merge(merger: ResolvedComponent[Merger], installed: Sequence[type[Merger]]) -> Iterator[Problem]:
    """Check that the merger leaves something to merge."""
    if not merger.component.merges:
        names = sorted(other.name for other in installed if other.merges)
        yield Problem(
            "merge",
            f"merger '{merger.component.name}' leaves the adapter beside the base, so there is nothing to merge; "
            f'remove "merge", or set finetune.merger to one that merges: {", ".join(names) or "none installed"}',
        )


def check_exporter(
    exporter: ResolvedComponent[Exporter], kind: BaseKind | None, installed: Sequence[type[Exporter]], place: str
) -> Iterator[Problem]:
    """Check that an exporter of codes gets a model that holds some; one whose kind is not known fits.

    Args:
        exporter: the component.
        kind: of the model to export: quantized, or floats.
        installed: the exporters to suggest from.
        place: where the exporter is named in the recipe.
    """
    if kind in (None, BaseKind.QUANTIZED) or not exporter.component.needs_codes:
        return
    fitting = sorted(other.name for other in installed if not other.needs_codes)
    yield Problem(
        place,
        f"'{exporter.component.name}' writes codes, but this recipe's model holds floats; "
        f"use {' or '.join(fitting) or 'another exporter'}, or add quantize",
    )


def check_export(
    exporter: ResolvedComponent[Exporter],
    model: ModelSource,
    quantizer: ResolvedComponent[Quantizer] | None,
    quantized: bool,
    place: str,
) -> Iterator[Problem]:
    """Check that an exporter can write this model, and codes on such grids.

    Args:
        exporter: the component.
        model: the recipe's model.
        quantizer: what makes the codes; None where they came with the model.
        quantized: whether the model to export holds codes.
        place: where the exporter is named in the recipe.
    """
    config = read_object(model.path / "config.json") if model.kind == "folder" and model.path.is_dir() else {}
    grid: dict[str, Any] = {}
    if quantized and quantizer:
        options = quantizer.component
        grid = {name: getattr(options, name) for name in ("bits", "group_size", "symmetric") if hasattr(options, name)}
        grid["act_order"] = getattr(options, "act_order", False) and not getattr(options, "static_groups", False)
    elif quantized and (stored := model.quantization):
        named = {"bits": "bits", "group_size": "group_size", "sym": "symmetric"}
        grid = {ours: stored[theirs] for theirs, ours in named.items() if theirs in stored}
    if grid.get("group_size") == -1:  # one group has no order
        grid["act_order"] = False
    if why := exporter.component.refuses(model.path, config, grid):
        yield Problem(place, why)
