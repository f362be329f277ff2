"""Values that pass between the core and components. No torch at import: it appears in annotations only."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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
class Pattern:
    """Which entries of a weight [out, in] compete with one another to be kept.

    "row": the entries of each row (Wanda's comparison group, paper §2.1). "layer": all entries of the matrix.
    "N:M": every M neighbours along a row, of which N are kept; `kept` is N and `of` is M, both 0 in the other two.
    """

    name: str
    kept: int = 0
    of: int = 0

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read the recipe's word: "row", "layer" or "N:M".

        Raises:
            ValueError: when it is none of these, or N is 0 or larger than M.
        """
        if text in ("row", "layer"):
            return cls(text)
        match = re.fullmatch(r"([0-9]+):([0-9]+)", text)
        kept, of = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= kept <= of:
            raise ValueError(f"pattern {text!r} is none of 'row', 'layer' and 'N:M' with 1 <= N <= M")
        return cls(f"{kept}:{of}", kept, of)

    @property
    def sparsity(self) -> float | None:
        """The sparsity that N:M gives every layer, 1 - N / M; None where each layer's own sparsity decides."""
        return 1 - self.kept / self.of if self.of else None

    def __str__(self) -> str:
        return self.name


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
class RankConfig:
    """One rank for each group of a search space, in its order. Hashable, so trials are remembered."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All rank configurations of an adapted model."""

    groups: tuple[RankGroup, ...]

    def choice(self, indices: Sequence[int]) -> RankConfig:
        """The configuration that takes, in each group, the rank at that index of its list."""
        return RankConfig(tuple(g.ranks[i] for g, i in zip(self.groups, indices, strict=True)))

    def ranks_by_linear(self, choice: RankConfig) -> dict[str, int]:
        """The rank of every linear layer under a configuration."""
        pairs = zip(self.groups, choice.ranks, strict=True)
        return {member: rank for group, rank in pairs for member in group.members}

    def __contains__(self, choice: object) -> bool:
        return (
            isinstance(choice, RankConfig)
            and len(choice.ranks) == len(self.groups)
            and all(r in g.ranks for g, r in zip(self.groups, choice.ranks, strict=True))
        )


class StepInfo(Protocol):
    """A step of a plan as hooks see it: `name` is unique ("evaluate:search"), `stage` is "evaluate"."""

    @property
    def name(self) -> str: ...

    @property
    def stage(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


class ArtifactInfo(Protocol):
    """A finished step's folder as hooks see it, and its report: what the stage measured."""

    @property
    def folder(self) -> Path: ...

    @property
    def report(self) -> dict[str, Any]: ...


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

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float: ...


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


class Select(Protocol):
    """What a scorer that updates weights asks with: which of a layer's entries stay, by the recipe's pattern."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Bool [out, some], true where kept, for the scores [out, some] of whole columns that follow one another; as
        many as the pattern's M, or a multiple. The layer's sparsity holds among them."""
        ...


SPARSITY_TOLERANCE = 0.005
"""How far from the sparsity that was asked for an allocation may lie, all its layers together."""


HESSIAN_BYTES = 4 << 30
"""Bytes of Hessians that are summed at once where layers are compressed one input after the other."""
