"""The hooks a plugin may implement, and the marker it implements them with.

Seven hooks offer components: each yields *classes*, and the registry finds them by kind and name.
Two are notifications: what they return is ignored and what they raise is logged, never fatal.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from sqft.components.kinds import Adapter, Allocator, Exporter, Merger, Quantizer, Scorer, Searcher
from sqft.types import ArtifactInfo, StepInfo

hookspec = pluggy.HookspecMarker("sqft")


hookimpl = pluggy.HookimplMarker("sqft")
"""Marks a function as an implementation of the hook whose name it has: `@hookimpl`."""


@hookspec
def sqft_scorers() -> Iterable[type[Scorer]]:
    """Scorers: how much each weight matters. Example: `yield Wanda`."""
    raise NotImplementedError


@hookspec
def sqft_allocators() -> Iterable[type[Allocator]]:
    """Allocators: how much sparsity each layer gets. Example: `yield Uniform`.

    What the layers get is, averaged by their sizes, the sparsity that the recipe asks for (within
    `SPARSITY_TOLERANCE`, 0.005); the core checks it.
    """
    raise NotImplementedError


@hookspec
def sqft_quantizers() -> Iterable[type[Quantizer]]:
    """Quantizers: put a weight on a low-precision grid and keep its zeros."""
    raise NotImplementedError


@hookspec
def sqft_adapters() -> Iterable[type[Adapter]]:
    """Adapters: which low-rank deltas train, at which ranks. Example: `yield Nls`."""
    raise NotImplementedError


@hookspec
def sqft_searchers() -> Iterable[type[Searcher]]:
    """Searchers: choose one configuration of ranks. Example: `yield HillClimbing`."""
    raise NotImplementedError


@hookspec
def sqft_mergers() -> Iterable[type[Merger]]:
    """Mergers: the definition of the effective weight. Example: `yield SparsePEFT`."""
    raise NotImplementedError


@hookspec
def sqft_exporters() -> Iterable[type[Exporter]]:
    """Exporters: write a finished model for a runtime. Example: `yield HuggingFace`."""
    raise NotImplementedError


@hookspec
def sqft_stage_started(step: StepInfo) -> None:
    """Called before a step does its work; not called for a step whose artifact is reused."""


@hookspec
def sqft_stage_finished(step: StepInfo, artifact: ArtifactInfo) -> None:
    """Called when a step's artifact stands complete in the store, made now or reused."""


COMPONENT_HOOKS: dict[str, str] = {
    "scorer": "sqft_scorers",
    "allocator": "sqft_allocators",
    "quantizer": "sqft_quantizers",
    "adapter": "sqft_adapters",
    "searcher": "sqft_searchers",
    "merger": "sqft_mergers",
    "exporter": "sqft_exporters",
}
"""The hook that offers each kind."""
