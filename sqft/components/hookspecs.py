"""The hooks that a plugin may implement, and the marker for its implementations.

Seven hooks offer components: each yields *classes*, and the registry finds them by kind and name.
Two hooks are notifications: their results are ignored, and their exceptions are logged and never fatal.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from sqft.components.kinds import Adapter, Allocator, Exporter, Merger, Quantizer, Scorer, Searcher
from sqft.types import ArtifactInfo, StepInfo

hookspec = pluggy.HookspecMarker("sqft")


hookimpl = pluggy.HookimplMarker("sqft")
"""The decorator that marks a function as the implementation of the hook of the same name: `@hookimpl`."""


@hookspec
def sqft_scorers() -> Iterable[type[Scorer]]:
    """Yield scorers, which decide how much each weight matters. Example: `yield Wanda`."""
    raise NotImplementedError


@hookspec
def sqft_allocators() -> Iterable[type[Allocator]]:
    """Yield allocators, which decide how much sparsity each layer gets. Example: `yield Uniform`.

    Averaged by the layers' sizes, the result must be the sparsity of the recipe, within `SPARSITY_TOLERANCE`
    (0.005). The core checks this.
    """
    raise NotImplementedError


@hookspec
def sqft_quantizers() -> Iterable[type[Quantizer]]:
    """Yield quantizers, which put a weight on a low-precision grid and keep its zeros. Example: `yield Gptq`."""
    raise NotImplementedError


@hookspec
def sqft_adapters() -> Iterable[type[Adapter]]:
    """Yield adapters, which decide which low-rank deltas are trained, and at which ranks. Example: `yield Nls`."""
    raise NotImplementedError


@hookspec
def sqft_searchers() -> Iterable[type[Searcher]]:
    """Yield searchers, which choose one rank configuration. Example: `yield HillClimbing`."""
    raise NotImplementedError


@hookspec
def sqft_mergers() -> Iterable[type[Merger]]:
    """Yield mergers, which define the effective weight. Example: `yield SparsePEFT`."""
    raise NotImplementedError


@hookspec
def sqft_exporters() -> Iterable[type[Exporter]]:
    """Yield exporters, which write a finished model in another program's format. Example: `yield HuggingFace`."""
    raise NotImplementedError


@hookspec
def sqft_stage_started(step: StepInfo) -> None:
    """Notify that a step starts its work. Not called for a step whose artifact is reused."""


@hookspec
def sqft_stage_finished(step: StepInfo, artifact: ArtifactInfo) -> None:
    """Notify that a step's artifact is complete in the store, whether it was made now or reused."""


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
