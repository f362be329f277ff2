"""The kinds of component that a plugin may offer.

A component is a frozen pydantic model with a `name` and the methods of its kind. Its fields are the
options a recipe may give, its docstring is its help, and it holds no state. Torch appears in
annotations only: a plugin's module must be importable without it, since every `sqft` command imports
them all.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from sqft.ranks import Evaluate, RankConfig, SearchSpace
from sqft.types import (
    BaseKind,
    BaseWeight,
    DeltaModule,
    LinearShape,
    LinearStats,
    ModelReader,
    Quantized,
    Select,
    Statistic,
)

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Component(BaseModel):
    """A named, frozen set of options, and the methods that its kind defines."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    kind: ClassVar[str]


class Scorer(Component):
    """Decides how much each weight matters: the core keeps the largest scores.

    A scorer defines `score`; or `prune`, if the kept weights change too, to compensate for the pruned ones.
    """

    kind: ClassVar[str] = "scorer"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.INPUT_NORM})

    def score(self, weight: Tensor, stats: LinearStats) -> Tensor:
        """Return scores [out, in], finite, any float dtype, for a float32 `weight` [out, in] it must not change."""
        raise NotImplementedError(f"scorer '{self.name}' prunes without scores")

    def prune(self, weight: Tensor, stats: LinearStats, select: Select) -> tuple[Tensor, Tensor]:
        """Return the pruned weight and its mask, for a float32 `weight` [out, in] it must not change.

        The mask, bool [out, in], is true for the weights that `select` kept; where it is false, the new weight
        [out, in] is 0. By default the kept weights do not change.
        """
        mask = select(self.score(weight, stats))
        if mask.shape != weight.shape:  # the core names it
            return weight, mask
        return weight.masked_fill(~mask, 0), mask


class Allocator(Component):
    """Decides how much sparsity each linear layer gets."""

    kind: ClassVar[str] = "allocator"
    needs: ClassVar[frozenset[Statistic]] = frozenset()
    """Statistics that `measure` needs; if there are any, the calibration text goes through the model once more."""

    def measure(self, weights: Mapping[str, Tensor], stats: Mapping[str, LinearStats]) -> Mapping[str, float]:
        """Return a finite number for each layer of one decoder block, given float32 weights [out, in] it must not
        change.

        Called block by block where `needs` asks for anything; an allocator that needs nothing does not define it.
        """
        raise NotImplementedError(f"allocator '{self.name}' measures nothing")

    @abstractmethod
    def allocate(
        self, linears: Sequence[LinearShape], sparsity: float, measured: Mapping[str, float]
    ) -> Mapping[str, float]:
        """Return a sparsity in [0, 1) for the name of each linear layer.

        Averaged by the layers' sizes, the result must be `sparsity`, within `SPARSITY_TOLERANCE`. If the options that
        the user gave allow no such result, raise `StageError`. `measured` has the results of `measure`.
        """


class Updater(Component):
    """Changes the kept weights of a pruned layer, to make up for the pruned ones, whichever scorer chose them."""

    kind: ClassVar[str] = "updater"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HESSIAN})

    @abstractmethod
    def update(self, weight: Tensor, mask: Tensor, stats: LinearStats) -> Tensor:
        """Return the new weight [out, in], finite, any float dtype, 0 where the mask is false.

        It must change none of its arguments.

        Args:
            weight: the dense weight, float32 [out, in], as it was loaded.
            mask: bool [out, in], true where the scorer keeps a weight.
            stats: what `needs` asks for, of inputs that come through the layers that were pruned and updated before.
        """


class Quantizer(Component):
    """Puts a weight on a grid and leaves pruned entries exactly zero."""

    kind: ClassVar[str] = "quantizer"
    needs: ClassVar[frozenset[Statistic]] = frozenset({Statistic.HESSIAN})
    gives_compensated: ClassVar[bool] = False
    """True if every result has `compensated`, the floats that were rounded: fine-tuning may then start from them."""

    @abstractmethod
    def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
        """Return codes and grid for a float32 `weight` [out, in]; where `mask` is false the value is 0."""

    def needs_dense(self) -> bool:
        """Return whether it needs the weight from before pruning, as `stats.dense`; the plan then asks for a sparsify
        step."""
        return False

    def incompatibility(self, linear: LinearShape) -> str | None:
        """Return why a layer of this size cannot have the grid of these options, and which sizes it can have; None if
        it can."""
        return None


class Adapter(Component):
    """Decides which low-rank deltas train, at which ranks."""

    kind: ClassVar[str] = "adapter"

    @abstractmethod
    def space(self, linears: Sequence[LinearShape]) -> SearchSpace:
        """Return the ranks each group of these layers may take; every layer is in exactly one group."""

    @abstractmethod
    def sample(self, space: SearchSpace, rng: Random) -> RankConfig:
        """Return the ranks of one training step. `rng` is seeded by the recipe's seed and the step."""

    @abstractmethod
    def delta(self, linear: LinearShape, generator: Generator) -> DeltaModule:
        """Return trainable factors for one layer, float32 on the CPU, drawn from `generator`; delta 0 at start."""

    def input_dropout(self) -> float:
        """Return the dropout on the adapter's input while it trains, in [0, 1); above 0, training takes two paths."""
        return 0.0


TimeLimit = Annotated[
    float | None, Field(gt=0, description="seconds of evaluation after which no other begins; null: no limit")
]
"""A searcher's option, for `Evaluate.within`."""


class Searcher(Component):
    """Chooses one rank configuration from a search space."""

    kind: ClassVar[str] = "searcher"
    evaluates: ClassVar[bool] = True
    """False if it never asks for the values of a configuration. A recipe may then name it in `evaluate.of` as
    `finetune:NAME`, unless it needs gradients with its default options."""

    def needs_gradients(self) -> bool:
        """Return whether it asks for `evaluate.first_order`, with these options."""
        return False

    def needs_records(self) -> bool:
        """Return whether it asks anything of the validation records."""
        return self.evaluates or self.needs_gradients()

    @abstractmethod
    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        """Return a configuration in `space`. It must be deterministic in `rng` and the answers of `evaluate`."""


class Merger(Component):
    """The one definition of the effective weight, for training's forward and for the merge."""

    kind: ClassVar[str] = "merger"
    bases: ClassVar[frozenset[BaseKind]]
    """The kinds of base it works on."""
    merges: ClassVar[bool] = True
    """False if the adapter stays beside the base: the ordinary two-path forward, and no merge stage."""
    keeps_mask: ClassVar[bool] = True
    """True if it promises to keep every zero of the base; the core verifies this after training and merge."""

    @abstractmethod
    def combine(self, base: BaseWeight, delta: Tensor) -> Tensor:
        """Return the effective weight, float32 [rows, in], for a delta of that shape; elementwise in `delta`.

        Called on blocks of rows. On a quantized base the core rounds the result on the base's grid.
        """

    def derivative(self, base: BaseWeight, delta: Tensor, grad: Tensor) -> Tensor:
        """Return d(loss)/d(delta) given d(loss)/d(combine's result), all [rows, in].

        By default autograd through `combine`; a merger may give its closed form, which
        `sqft.testing.check_merger` compares with that default.
        """
        import torch

        with torch.enable_grad():
            leaf = delta.detach().requires_grad_()
            (result,) = torch.autograd.grad(self.combine(base, leaf), leaf, grad)
        return result

    def learns_scales(self) -> bool:
        """Return whether the scales of a quantized base train too."""
        return False


class Exporter(Component):
    """Writes a finished model for a runtime."""

    kind: ClassVar[str] = "exporter"
    needs_codes: ClassVar[bool] = False
    """True if it writes codes and grids: the plan refuses it for a model of floats."""
    reads_single_experts: ClassVar[bool] = True
    """False if readers of its codes would miss those of experts which the model's class joins: the plan refuses it for
    them."""

    def refuses(self, path: Path, config: Mapping[str, Any], grid: Mapping[str, Any]) -> str | None:
        """Return why it cannot write a model, for the plan; None when it can, or only the weights will tell.

        Args:
            path: the recipe's model, a folder or a GGUF file; no weight should be read.
            config: the content of its config.json; empty where there is none.
            grid: of codes, as far as the plan knows it: `bits`, `group_size` (-1: a row), `symmetric` and `act_order`,
                whether each input names its group; empty for a model of floats.
        """
        return None

    @abstractmethod
    def export(self, model: ModelReader, folder: Path) -> None:
        """Write `model` into the empty `folder`."""


KINDS: dict[str, type[Component]] = {
    cls.kind: cls for cls in (Scorer, Allocator, Updater, Quantizer, Adapter, Searcher, Merger, Exporter)
}
"""Every kind of component, by its name in recipes and messages."""
