"""The kinds of component and the values that pass through them.

A component is a frozen pydantic model with a `name` and one verb. Its fields are the options a
recipe may give, its docstring is its help, and it holds no state. Torch appears in annotations
only: a plugin's module must be importable without it, since every `sqft` command imports them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Generator, Tensor
from sqft.types import (
    BaseKind,
    BaseWeight,
    DeltaModule,
    Evaluate,
    LinearShape,
    LinearStats,
    ModelReader,
    Quantized,
    RankConfig,
    SearchSpace,
    Select,
    Statistic,
)


class Component(BaseModel):
    """A named, frozen set of options with one verb (defined by its kind)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    kind: ClassVar[str]
    verb: ClassVar[str]


class Scorer(Component):
    """Says how much each weight matters. The core keeps the largest."""

    kind: ClassVar[str] = "scorer"
    verb: ClassVar[str] = "score"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUT_NORM})
    updates: ClassVar[bool] = False
    """True when the weights that stay change too, to make up for those that go: `prune` says how."""

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        """Scores [out, in], finite, any float dtype, for a float32 `weight` [out, in] it must not change."""
        raise NotImplementedError

    def prune(self, weight: Tensor, stats: LinearStats, select: Select) -> tuple[Tensor, Tensor]:
        """The weight [out, in] that takes the place of a float32 `weight`, which it must not change, and the bool mask
        [out, in] of what `select` let it keep; where that is false the new weight is 0.

        Called where `updates` is true, and `score` is then not.
        """
        raise NotImplementedError


class Allocator(Component):
    """Says how much sparsity each linear layer gets."""

    kind: ClassVar[str] = "allocator"
    verb: ClassVar[str] = "allocate"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    """What it measures the dense layers by; with any, calibration text walks the model once more for it."""

    def measure(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> Mapping[str, float]:
        """A finite number for each layer of one decoder block, of float32 weights [out, in] it must not change.

        Called block by block where `needs` asks for anything.
        """
        raise NotImplementedError

    def allocate(
        self, linears: Sequence[LinearShape], sparsity: float, measured: Mapping[str, float]
    ) -> Mapping[str, float]:
        """A fraction in [0, 1) for each linear's name, given the fraction wanted of all their weights together;
        `measured` has what `measure` gave.

        Averaged by the layers' sizes, the fractions are what was wanted, within `SPARSITY_TOLERANCE`; where options
        that the user gave leave no such allocation, raise `StageError`.
        """
        raise NotImplementedError


class Quantizer(Component):
    """Puts a weight on a grid and leaves pruned entries exactly zero."""

    kind: ClassVar[str] = "quantizer"
    verb: ClassVar[str] = "quantize"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HESSIAN})

    def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
        """Codes and grid for a float32 `weight` [out, in]; where `mask` is false the value is 0."""
        raise NotImplementedError

    def incompatibility(self, linear: LinearShape) -> str | None:
        """Why a layer of this size cannot lie on the grid these options ask for, and what could; None when it can."""
        return None


class Adapter(Component):
    """Says which low-rank deltas train, at which ranks."""

    kind: ClassVar[str] = "adapter"
    verb: ClassVar[str] = "delta"
    input_dropout: ClassVar[str | None] = None
    """Name of the field that holds the dropout on the adapter's input, if the adapter has one."""

    def space(self, linears: Sequence[LinearShape]) -> SearchSpace:
        """The ranks each group of these layers may take; every layer is in exactly one group."""
        raise NotImplementedError

    def sample(self, space: SearchSpace, rng: Random) -> RankConfig:
        """The ranks of one training step. `rng` is seeded by the recipe's seed and the step."""
        raise NotImplementedError

    def delta(self, linear: LinearShape, generator: Generator) -> DeltaModule:
        """Trainable factors for one layer, float32 on the CPU, drawn from `generator`; delta 0 at start."""
        raise NotImplementedError


class Searcher(Component):
    """Chooses one configuration out of a search space."""

    kind: ClassVar[str] = "searcher"
    verb: ClassVar[str] = "search"
    evaluates: ClassVar[bool] = True
    """False when it never calls `evaluate`: it may then be named in `evaluate.of` as `finetune:NAME`."""

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        """A configuration in `space`. It must be deterministic in `rng` and the answers of `evaluate`."""
        raise NotImplementedError


class Merger(Component):
    """The one definition of the effective weight, for training's forward and for the merge."""

    kind: ClassVar[str] = "merger"
    verb: ClassVar[str] = "combine"
    bases: ClassVar[frozenset[BaseKind]]
    """The kinds of base it works on."""
    merges: ClassVar[bool] = True
    """False when the adapter stays beside the base: the ordinary two-path forward, and no merge stage."""
    keeps_mask: ClassVar[bool] = True
    """True when it promises to keep every zero of the base; the core proves it after training and merge."""
    scale_option: ClassVar[str | None] = None
    """Name of the field that says whether a quantized base's scales train too, if the merger has one."""

    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        """The effective weight, float32 [rows, in], for a delta of that shape; elementwise in `delta`.

        Called on blocks of rows. On a quantized base the core rounds the result on the base's grid.
        """
        raise NotImplementedError

    def derivative(self, base: BaseWeight, delta: Tensor, grad: Tensor) -> Tensor:
        """d(loss)/d(delta) given d(loss)/d(combine's result), all [rows, in].

        By default autograd through `combine`; a merger may give its closed form, which
        `sqft.testing.check_merger` compares with that default.
        """
        import torch

        with torch.enable_grad():
            leaf = delta.detach().requires_grad_()
            (result,) = torch.autograd.grad(self.combine(base, leaf), leaf, grad)
        return result


class Exporter(Component):
    """Writes a finished model for a runtime."""

    kind: ClassVar[str] = "exporter"
    verb: ClassVar[str] = "export"
    needs_codes: ClassVar[bool] = False
    """True when it writes codes and grids: the plan refuses it where the model holds floats."""

    def export(self, model: ModelReader, folder: Path) -> None:
        """Write `model` into the empty `folder`."""
        raise NotImplementedError


KINDS: dict[str, type[Component]] = {
    cls.kind: cls for cls in (Scorer, Allocator, Quantizer, Adapter, Searcher, Merger, Exporter)
}
"""Every kind of component by the word recipes and messages use for it."""
