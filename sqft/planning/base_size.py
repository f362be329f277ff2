"""How large the model under the adapters is, on disk and in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar, cast

from sqft.components.kinds import Component, Merger, Quantizer
from sqft.planning import estimates
from sqft.planning.plan import ResolvedComponent, Step
from sqft.planning.resolution import Resolver
from sqft.recipe.sections import Finetune, Sparsify
from sqft.types import LinearShape

C = TypeVar("C", bound=Component)

Steps = Mapping[str, Step]
"""The steps planned so far, by name."""


def stored_base(resolver: Resolver, steps: Steps) -> int:
    """Return the bytes on disk of the model under the adapters."""
    model = resolver.model
    if model.quantization is not None:
        return estimates.quantized_bytes(model, resolver.dtype, model.layout.linears, model.quantization["bits"])
    if "quantize" in steps:
        bits = bits_of(component_of(steps["quantize"], Quantizer))
        return estimates.quantized_bytes(model, resolver.dtype, _layers(resolver, steps, "quantize"), bits)
    return estimates.model_bytes(model, resolver.dtype)


def loaded_base(
    resolver: Resolver, merger: ResolvedComponent[Merger] | None, steps: Steps, adapted: Iterable[str]
) -> int:
    """Return the bytes in memory of the model under the adapters.

    Codes stay packed, unless the merger starts from the floats that were quantized.

    Args:
        resolver: knows the model.
        merger: None when it was not found.
        steps: those planned so far.
        adapted: the layers that have adapters.
    """
    start = resolver.recipe.finetune.base if resolver.recipe.finetune else None
    if start == "floats" and "quantize" in steps and merger and merger.component.merges:
        return estimates.model_bytes(resolver.model, resolver.dtype)
    if start == "packed" and "sparsify" in steps:
        sparsity = cast(Sparsify, steps["sparsify"].section).sparsity
        return estimates.packed_bytes(resolver.model, resolver.dtype, _layers(resolver, steps, "sparsify"), sparsity)
    under = set(adapted) if start == "compensated" else ()
    residuals = estimates.weights_in(layer for layer in _layers(resolver, steps, "quantize") if layer.name in under)
    return stored_base(resolver, steps) + estimates.RESIDUAL_BYTES * residuals


def opening_base(resolver: Resolver, merger: ResolvedComponent[Merger] | None, steps: Steps, loaded: int) -> int:
    """Return the bytes at the peak of loading the model under the adapters, after `finetune`.

    Args:
        resolver: knows the model.
        merger: None when it was not found.
        steps: those planned so far.
        loaded: bytes once it is loaded, see `loaded_base`.
    """
    finetune, size = steps["finetune"], estimates.model_bytes(resolver.model, resolver.dtype)
    start = cast(Finetune, finetune.section).base
    if start == "packed" and not finetune.streamed:  # with its zeros at first
        return max(loaded, size)
    if start == "floats" and "quantize" in steps and merger and merger.component.merges:  # the values of the codes too
        return loaded + size
    return loaded


def _layers(resolver: Resolver, steps: Steps, name: str) -> list[LinearShape]:
    """Return the layers that a step changes; none when the recipe has no such step."""
    names = set(steps[name].layers) if name in steps else ()
    return [layer for layer in resolver.model.layout.linears if layer.name in names]


def bits_of(quantizer: ResolvedComponent[Quantizer] | None) -> float | None:
    """Return the bits of a quantizer's codes; None when it has no such option, or was not found."""
    return getattr(quantizer.component, "bits", None) if quantizer else None


def component_of(step: Step, kind: type[C]) -> ResolvedComponent[C] | None:
    """Return a step's component of a kind; None when it was not found."""
    return cast("ResolvedComponent[C] | None", step.components.get(kind.kind))
