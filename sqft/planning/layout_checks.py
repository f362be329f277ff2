"""Check the layers that a recipe chooses against what is known of the model's modules, and say what is left alone.

Each check yields problems with their path in the recipe, and raises nothing. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from sqft.checkpoints.gptq import JOINED
from sqft.checkpoints.layout import LeftOut, ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.components.kinds import Exporter, Merger
from sqft.errors import Problem
from sqft.types import LinearShape
from sqft.utils.globs import names_itself, selected
from sqft.utils.text import shortened

Layers = Sequence[LinearShape]


def check_headers(source: ModelSource, place: str = "model.path") -> Iterator[Problem]:
    """Check that the checkpoint has every tensor that the modules need, in their shape."""
    for problem in source.layout.problems:
        yield Problem(place, f"{source.path}: {problem}")


def check_inside(layout: ModelLayout, patterns: Sequence[str], place: str) -> Iterator[Problem]:
    """Check that no pattern means the head or the embedding, and nothing else."""
    for index, pattern in enumerate(patterns):
        named = next((name for name in layout.outside if names_itself(name, [pattern])), None)
        if named and not any(selected(layer.name, [pattern], ()) for layer in layout.linears):
            yield Problem(
                f"{place}.{index}",
                f"'{pattern}' is {named}, {layout.outside[named]}; sqft works on linear layers inside decoder blocks, "
                "and never changes the embedding or the head; remove it",
            )


def check_own_weights(layout: ModelLayout, layers: Layers, place: str) -> Iterator[Problem]:
    """Check that each layer has a weight of its own."""
    if shared := [layer.name for layer in layers if layer.name in layout.shared]:
        names = [f"{name} is one weight with {layout.shared[name]}" for name in shared]
        yield Problem(place, f"{shortened(names)}; exclude layers that share a weight")


def check_seen(layout: ModelLayout, layers: Layers, place: str) -> Iterator[Problem]:
    """Check that calibration sees every layer."""
    if unseen := [layer.name for layer in layers if layer.name in set(layout.unseen)]:
        yield Problem(
            place,
            "calibration measures what a layer is given, and these are not called, as their blocks read the weight "
            f"itself: {shortened(unseen)}; exclude them",
        )


def check_peft(layout: ModelLayout, targets: Layers, merger: Merger) -> Iterator[Problem]:
    """Check that stock PEFT can apply an adapter that stays beside its base."""
    if merger.merges:
        return
    experts, uncalled = set(layout.experts), set(layout.unseen)
    writes = f"PEFT, for which '{merger.name}' writes its adapter,"
    if adapted := [layer.name for layer in targets if layer.name.rpartition(".")[0] in experts]:
        yield Problem(
            "finetune.targets",
            f"names {adapted[0]}, and {writes} cannot adapt a single expert; use a merger that merges, or targets "
            "outside the experts (full names with *)",
        )
    if missed := [layer.name for layer in targets if layer.name in uncalled]:
        yield Problem(
            "finetune.targets",
            f"{layout.architecture} does not call {shortened(missed)}, and {writes} changes what is called; "
            "leave it out, or use a merger that merges",
        )


def codes_apart(layout: ModelLayout, layers: Layers) -> Iterator[str]:
    """Say which layers have codes that are stored under names which the class itself does not know."""
    if unnamed := [layer.name for layer in layers if layer.name in layout.unnamed]:
        yield (
            f"codes of {shortened(unnamed)} are stored layer by layer, where a checkpoint of {layout.architecture} has "
            f"none ({layout.unnamed[unnamed[0]]}): sqft reads them, other programs only if they know such names"
        )


def half_joined(layout: ModelLayout, layers: Layers) -> Iterator[str]:
    """Say which layers stay floats though others are quantized that servers join with them."""
    known, chosen = ({layer.name for layer in some} for some in (layout.linears, layers))
    for parts in JOINED.values():
        parents = {parent for parent, _, part in (name.rpartition(".") for name in chosen) if part in parts}
        floats = [part for part in parts if any(f"{parent}.{part}" in known - chosen for parent in parents)]
        if floats:
            yield (
                f"leaves {', '.join(floats)} in floats: vLLM and SGLang join {', '.join(parts)}, and refuse or "
                "misread a folder that quantizes some of them only"
            )


def check_codes_apart(layout: ModelLayout, layers: Layers, exporter: Exporter, place: str) -> Iterator[Problem]:
    """Check that readers of an exporter's codes find those of layers which the class itself does not know."""
    unnamed = [layer.name for layer in layers if layer.name in layout.unnamed]
    if unnamed and exporter.needs_codes and not exporter.reads_single_experts:
        yield Problem(
            place,
            f"{layout.architecture} joins {shortened(unnamed)} in its checkpoints ({layout.unnamed[unnamed[0]]}), so "
            f"that it would not find their codes in a folder of '{exporter.name}', and would fill these layers at "
            'random; put "*.experts.*" into quantize.exclude, or use the exporter hf',
        )


def notes(layout: ModelLayout) -> Iterator[str]:
    """Say what of the model stays as it is, and what of its checkpoint has no place in it."""
    by_reason: dict[str, list[LeftOut]] = {}
    for part in layout.left_out:
        by_reason.setdefault(f"left as it is, {part.reason}", []).append(part)
    for part in layout.dropped:
        by_reason.setdefault(f"left out, {part.reason}", []).append(part)
    for reason, parts in by_reason.items():
        named = shortened([f"{part.name} ({part.weights:,} weights)" for part in parts])
        total = f"; {sum(part.weights for part in parts):,} weights in all" if len(parts) > 3 else ""
        yield f"{reason}: {named}{total}"
