"""The kinds of component and the values that pass through them.

A component is a frozen pydantic model with a `name` and one verb. Its fields are the options a
recipe may give, its docstring is its help, and it holds no state. Torch appears in annotations
only: a plugin's module must be importable without it, since every `sqft` command imports them all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Statistic(StrEnum):
    """What a component may ask the calibration walk to collect for each linear layer."""

    INPUT_NORM = "input-norm"
    """Sum over tokens of squared inputs, float32 [in]."""
    HESSIAN = "hessian"
    """Sum over tokens of x xᵀ, float32 [in, in]."""


class BaseKind(StrEnum):
    """What kind of weight lies under the adapters."""

    DENSE = "dense"
    SPARSE = "sparse"
    QUANTIZED = "quantized"


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer by name and size: weight [out_features, in_features]."""

    name: str
    out_features: int
    in_features: int


@dataclass(frozen=True, slots=True)
class LinearStats:
    """What calibration saw at one linear layer's input. Float32, on the weight's device.

    `generator` is seeded from the recipe's seed and the layer's name, for scorers that draw.
    """

    tokens: int
    input_sq_sum: Tensor | None = None  # [in]
    hessian: Tensor | None = None  # [in, in]
    generator: Generator | None = None
    unreached: bool = False
    """True of an expert that no token was routed to: what it saw is every token instead."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A uniform grid for each group of `group_size` inputs: value = scale · (code − zero).

    `scale` float [out, groups] in its stored dtype, `zero` integer [out, groups] in [0, 2**bits − 1].
    `group_size` −1 means one group a row. `group_index` [in] gives each input its group when the
    groups are not contiguous (act-order).
    """

    scale: Tensor
    zero: Tensor
    group_size: int
    bits: int
    group_index: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Quantized:
    """A quantizer's result: integer codes [out, in] on a grid."""

    codes: Tensor
    grid: Grid


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """The frozen weight under an adapter, or a block of its rows, in float32.

    `weight` float32 [rows, in] (the dequantized value on a quantized base), `mask` bool [rows, in],
    true where the base keeps a weight; None means that it keeps all of them.
    """

    weight: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Linear layers that share one rank, and the ranks it may take, largest first."""

    name: str
    ranks: tuple[int, ...]
    members: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """One rank for each group of a search space, in its order. Hashable, so trials are remembered."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All rank configurations of an adapted model."""

    groups: tuple[RankGroup, ...]

    def choice(self, indices: Sequence[int]) -> Choice:
        """The configuration that takes, in each group, the rank at that index of its list."""
        return Choice(tuple(g.ranks[i] for g, i in zip(self.groups, indices, strict=True)))

    def ranks_by_linear(self, choice: Choice) -> dict[str, int]:
        """The rank of every linear layer under a configuration."""
        pairs = zip(self.groups, choice.ranks, strict=True)
        return {member: rank for group, rank in pairs for member in group.members}

    def __contains__(self, choice: object) -> bool:
        return (
            isinstance(choice, Choice)
            and len(choice.ranks) == len(self.groups)
            and all(r in g.ranks for g, r in zip(self.groups, choice.ranks, strict=True))
        )


class DeltaModule(Protocol):
    """One layer's trainable low-rank factors; in practice a `torch.nn.Module`.

    `rank` is its largest rank. The delta of rank r is `scale · B @ A`, and a smaller rank uses the
    first r columns of B and the first r rows of A (paper §2.2).
    """

    rank: int

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """(B [out, rank], A [rank, in], scale); gradients reach the full factors through them."""
        ...


class Evaluate(Protocol):
    """What a searcher asks with: the metric of a configuration, larger is better.

    `samples` takes the first so many records of the validation set in one seeded order, drawn once
    for the whole search (Algorithm 1's proxy set D_M); None takes them all. Answers are remembered
    on disk, so a deterministic searcher that is killed repeats its questions and pays once.
    """

    def __call__(self, choice: Choice, samples: int | None = None) -> float: ...


class ModelReader(Protocol):
    """A finished model as an exporter sees it, one tensor at a time: its weights as floats, and the codes of those
    that lie on a grid."""

    @property
    def folder(self) -> Path:
        """Where it lies; to be left as it is."""
        ...

    def names(self) -> Sequence[str]:
        """Its parameters as the float model names them: a quantized layer's weight is "{layer}.weight"."""
        ...

    def tensor(self, name: str) -> Tensor:
        """One parameter; a quantized layer's weight [out, in] is what its codes stand for, in the precision of the
        weights that are floats."""
        ...

    def quantized(self) -> Sequence[str]:
        """The layers on a grid; none of a float model."""
        ...

    def codes(self, layer: str) -> Quantized:
        """The codes [out, in] and the grid of one of them."""
        ...

    def copy_settings(self, folder: Path) -> None:
        """Copy all that is no weight: config.json without `quantization_config`, tokenizer, chat template, generation
        config, custom code, licence."""
        ...


class Component(BaseModel):
    """A named, frozen set of options with one verb (defined by its kind)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    kind: ClassVar[str]
    verb: ClassVar[str]


class Select(Protocol):
    """What a scorer that updates weights asks with: which of a layer's entries stay, by the recipe's pattern."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Bool [out, some], true where kept, for the scores [out, some] of whole columns that follow one another; as
        many as the pattern's M, or a multiple. The layer's sparsity holds among them."""
        ...


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


SPARSITY_TOLERANCE = 0.005
"""How far from the sparsity that was asked for an allocation may lie, all its layers together."""


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

    def misfit(self, linear: LinearShape) -> str | None:
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

    def sample(self, space: SearchSpace, rng: Random) -> Choice:
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

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> Choice:
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
