"""The hooks that a plugin may implement, and the marker for its implementations.

Eight hooks offer components: each yields *classes*, and the registry finds them by kind and name.
Two hooks are notifications: their results are ignored, and their exceptions are logged and never fatal.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from sqft.components.kinds import KINDS, Adapter, Allocator, Exporter, Merger, Quantizer, Scorer, Searcher, Updater
from sqft.types import ArtifactInfo, StepInfo

hookspec = pluggy.HookspecMarker("sqft")
hookimpl = pluggy.HookimplMarker("sqft")
"""The decorator that marks a function as the implementation of the hook of the same name: `@hookimpl`."""
COMPONENT_HOOKS = {kind: f"sqft_{kind}s" for kind in KINDS}
"""The hook that offers each kind."""


@hookspec
def sqft_scorers() -> Iterable[type[Scorer]]:
    """Yield scorers, which decide how much each weight matters.

    Example:
        ```python
        from sqft.api import Scorer, hookimpl


        class Magnitude(Scorer):
            "Weight magnitude: |W_ij|."

            name = "my-magnitude"
            needs = frozenset()

            def score(self, weight, stats):
                return weight.abs()


        @hookimpl
        def sqft_scorers():
            yield Magnitude
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_allocators() -> Iterable[type[Allocator]]:
    """Yield allocators, which decide how much sparsity each layer gets.

    Averaged by the layers' sizes, the result must be the sparsity of the recipe, within `SPARSITY_TOLERANCE`
    (0.005). The core checks this.

    Example:
        ```python
        from sqft.api import Allocator, hookimpl


        class Same(Allocator):
            "Every layer gets the sparsity that the recipe asks for."

            name = "my-uniform"

            def allocate(self, linears, sparsity, measured):
                return {linear.name: sparsity for linear in linears}


        @hookimpl
        def sqft_allocators():
            yield Same
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_updaters() -> Iterable[type[Updater]]:
    """Yield updaters, which change the kept weights to make up for the pruned ones.

    Example:
        ```python
        from sqft.api import Statistic, Updater, hookimpl


        class Rescaled(Updater):
            "Each row is scaled so that its output changes least: one factor a row."

            name = "my-rescaled"
            needs = frozenset({Statistic.HESSIAN})

            def update(self, weight, mask, stats):
                kept = weight.masked_fill(~mask, 0)
                through = kept @ stats.hessian  # [out, in]
                wanted, own = (weight * through).sum(1), (kept * through).sum(1)
                return kept * (wanted / own.clamp(min=1e-30))[:, None]


        @hookimpl
        def sqft_updaters():
            yield Rescaled
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_quantizers() -> Iterable[type[Quantizer]]:
    """Yield quantizers, which put a weight on a low-precision grid and keep its zeros.

    Example:
        ```python
        from sqft.api import Grid, Quantized, Quantizer, hookimpl


        class FourBits(Quantizer):
            "Round to nearest on one 4-bit grid for each row."

            name = "my-rtn"
            needs = frozenset()

            def quantize(self, weight, mask, stats):
                from sqft.kernels.grids import fit_grid, quantize

                scale, zero = fit_grid(weight[:, None], 4, True)  # one group of all inputs in each row
                grid = Grid(scale.half(), zero, group_size=-1, bits=4)
                return Quantized(quantize(weight, grid), grid)


        @hookimpl
        def sqft_quantizers():
            yield FourBits
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_adapters() -> Iterable[type[Adapter]]:
    """Yield adapters, which decide which low-rank deltas are trained, and at which ranks.

    Example:
        ```python
        from sqft.api import Adapter, RankConfig, RankGroup, SearchSpace, hookimpl


        class RankOne(Adapter):
            "B [out, 1] zeros and A [1, in] drawn, for every layer."

            name = "my-rank-one"

            def space(self, linears):
                return SearchSpace(tuple(RankGroup(linear.name, (1,), (linear.name,)) for linear in linears))

            def sample(self, space, rng):
                return RankConfig((1,) * len(space.groups))

            def delta(self, linear, generator):
                import torch

                class Delta(torch.nn.Module):
                    rank = 1

                    def __init__(self):
                        super().__init__()
                        A = torch.randn(1, linear.in_features, generator=generator, dtype=torch.float32)
                        self.A = torch.nn.Parameter(A)
                        self.B = torch.nn.Parameter(torch.zeros(linear.out_features, 1, dtype=torch.float32))

                    def factors(self, rank):
                        return self.B, self.A, 1.0

                return Delta()


        @hookimpl
        def sqft_adapters():
            yield RankOne
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_searchers() -> Iterable[type[Searcher]]:
    """Yield searchers, which choose one rank configuration.

    Example:
        ```python
        from sqft.api import Searcher, hookimpl


        class Better(Searcher):
            "The better of the largest and the smallest ranks."

            name = "my-searcher"

            def search(self, space, evaluate, rng):
                largest = space.choice([0 for _ in space.groups])
                smallest = space.choice([-1 for _ in space.groups])
                return max(largest, smallest, key=evaluate)


        @hookimpl
        def sqft_searchers():
            yield Better
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_mergers() -> Iterable[type[Merger]]:
    """Yield mergers, which define the effective weight.

    Example:
        ```python
        from sqft.api import BaseKind, Merger, hookimpl


        class Masked(Merger):
            "The delta acts only where the base kept a weight."

            name = "my-merger"
            bases = frozenset({BaseKind.SPARSE, BaseKind.DENSE})

            def combine(self, base, delta):
                return base.weight + (delta if base.mask is None else delta * base.mask)


        @hookimpl
        def sqft_mergers():
            yield Masked
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_exporters() -> Iterable[type[Exporter]]:
    """Yield exporters, which write a finished model in another program's format.

    Example:
        ```python
        from sqft.api import Exporter, hookimpl, write_shards


        class Floats(Exporter):
            "A Hugging Face folder of floats."

            name = "my-floats"

            def export(self, model, folder):
                model.copy_settings(folder)
                write_shards(((name, model.tensor(name)) for name in model.names()), folder, "5GB")


        @hookimpl
        def sqft_exporters():
            yield Floats
        ```
    """
    raise NotImplementedError


@hookspec
def sqft_stage_started(step: StepInfo) -> None:
    """Notify that a step starts its work. Not called for a step whose artifact is reused.

    Args:
        step: the step, with its `name` ("evaluate:search"), its `stage` ("evaluate") and its `fingerprint`.

    Example:
        ```python
        from sqft.api import hookimpl


        @hookimpl
        def sqft_stage_started(step):
            print(step.name, "started")
        ```
    """


@hookspec
def sqft_stage_finished(step: StepInfo, artifact: ArtifactInfo) -> None:
    """Notify that a step's artifact is complete in the store, whether it was made now or reused.

    Args:
        step: the step, as in `sqft_stage_started`.
        artifact: the `folder` of its result, and the `report` with the numbers that it measured.

    Example:
        ```python
        from sqft.api import hookimpl


        @hookimpl
        def sqft_stage_finished(step, artifact):
            print(step.name, artifact.report.get("sparsity"))
        ```
    """
