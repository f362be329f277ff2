"""Values that pass between the core and components. No torch at import: it appears only in annotations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import chain, islice, product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Generator, Tensor


class Statistic(StrEnum):
    """Statistics that a component may need from calibration, for each linear layer."""

    INPUT_NORM = "input-norm"
    """Sum over tokens of squared inputs, float32 [in]."""
    HESSIAN = "hessian"
    """Sum over tokens of x xᵀ, float32 [in, in]."""


class BaseKind(StrEnum):
    """The kind of weight that lies under the adapters."""

    DENSE = "dense"
    SPARSE = "sparse"
    QUANTIZED = "quantized"


@dataclass(frozen=True, slots=True)
class InputPath:
    """Marks a field of a recipe, or an option of a component, as the path of a file that a step reads.

    A relative path starts at the recipe's folder, and a component gets the absolute one. The file's content is part of
    the step's fingerprint, its name is not. `folder`: it is a folder. `hub`: it may be a Hugging Face id instead, which
    the recipe's section that holds it resolves; no option can be one. `words`: texts that mean something else; where
    one of them is written, there is no path. An option so marked is str, Path or None.
    """

    folder: bool = False
    hub: bool = False
    words: tuple[str, ...] = ()


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
            raise ValueError(f"pattern {text!r} must be 'row', 'layer' or 'N:M' with 1 <= N <= M")
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
    """The name of one linear layer, and the statistics of its inputs from calibration. Float32, on the weight's device.

    `generator` is seeded from the recipe's seed and the layer's name, for components that need random numbers.
    """

    tokens: int
    input_sq_sum: Tensor | None = None  # [in]
    hessian: Tensor | None = None  # [in, in]
    generator: Generator | None = None
    unreached: bool = False
    """True for an expert to which no token was routed: its statistics are then those of all tokens."""
    name: str = ""
    """The layer's name; empty where a component is tried by itself."""
    dense: Tensor | None = None  # [out, in]
    """The layer's weight before pruning, for a quantizer that says that it needs it."""
    weight_in: Callable[[Path], Tensor] | None = None
    """For a scorer: a function that returns the same layer's weight [out, in], in its stored precision, of another
    model's folder. It raises SqftError where that does not hold the layer as floats."""


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
    """A quantizer's result: integer codes [out, in] on a grid.

    `compensated` float [out, in] is what the quantizer rounded: the weight after everything that it changed to make up
    for the errors of others. Rounded to nearest on the grid it gives the codes, and pruned entries are 0. None: the
    quantizer does not say.
    """

    codes: Tensor
    grid: Grid
    compensated: Tensor | None = None


@dataclass(frozen=True, slots=True)
class BaseWeight:
    """The frozen weight under an adapter, or a block of its rows, in float32.

    `weight` float32 [rows, in] (on a quantized base: the dequantized value, or the
    float from before quantization), `mask` bool [rows, in],
    true where the base keeps a weight. None means that it keeps all of them.
    """

    weight: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class RankGroup:
    """Linear layers that share one rank, and the ranks that they may take, largest first.

    An adapter gives the first three. The core fills in the others before it hands the space of a trained adapter to a
    searcher.
    """

    name: str
    ranks: tuple[int, ...]
    members: tuple[str, ...]
    cost: int = 0
    """Parameters that one rank costs: the inputs and outputs of all members."""
    losses: tuple[float, ...] = ()
    """For each of `ranks`, what the trained deltas lose at it: ‖Δ_R − Δ_r‖² (Frobenius), R the largest rank, summed
    over the members. The first is 0."""


@dataclass(frozen=True, slots=True)
class RankConfig:
    """One rank for each group of a search space, in its order. Hashable, so that trials can be remembered."""

    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """All rank configurations of an adapted model."""

    groups: tuple[RankGroup, ...]

    def choice(self, indices: Sequence[int]) -> RankConfig:
        """Return the configuration that takes, in each group, the rank at that index of its list."""
        return RankConfig(tuple(g.ranks[i] for g, i in zip(self.groups, indices, strict=True)))

    def median(self) -> Indices:
        """Return the indices of the paper's reference configuration: (n − 1) // 2 of each descending list."""
        return tuple((len(group.ranks) - 1) // 2 for group in self.groups)

    def neighbours(self, anchor: Indices, step: int, count: int, visited: set[Indices], rng: Random) -> list[Indices]:
        """Return up to `count` unvisited neighbours of an anchor, and add them to `visited`.

        As Algorithm 1 of the paper draws them. A neighbour differs in one or more groups, each by at most `step`
        positions in its list. First the number of groups that change is drawn, uniformly from 1 to all that can change;
        then the groups, and then a change for each, uniformly. If drawing finds too few, all are listed in order.
        """
        moves = [
            [i for i in range(max(0, index - step), min(index + step + 1, len(group.ranks))) if i != index]
            for index, group in zip(anchor, self.groups, strict=True)
        ]
        movable = [position for position, moved in enumerate(moves) if moved]

        def at_random() -> Iterator[Indices]:
            for _ in range(64 * count if movable else 0):  # the same one may be drawn again
                moving = set(rng.sample(movable, rng.randint(1, len(movable))))
                yield tuple(rng.choice(moves[i]) if i in moving else index for i, index in enumerate(anchor))

        # The list of all can be very long, but it is left early. Its first is the anchor.
        listed = islice(product(*((index, *moved) for index, moved in zip(anchor, moves, strict=True))), 1, None)
        found: list[Indices] = []
        for candidate in chain(at_random(), listed):
            if candidate not in visited:
                visited.add(candidate)
                found.append(candidate)
                if len(found) == count:
                    break
        return found

    def parameters(self, choice: RankConfig) -> int:
        """Count the parameters of a configuration's factors."""
        return sum(group.cost * rank for group, rank in zip(self.groups, choice.ranks, strict=True))

    def ranks_by_linear(self, choice: RankConfig) -> dict[str, int]:
        """Return the rank of every linear layer under a configuration."""
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
    first r columns of B and the first r rows of A (paper §2.2). A learning rate of B's own
    (`finetune.learning_rate_ratio`) is for the parameters that B is made of, and A is not.
    """

    rank: int

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        """(B [out, rank], A [rank, in], scale); gradients reach the full factors through them."""
        ...


class RecordValue(NamedTuple):
    """What one record contributes to a metric; larger totals are better.

    The metric of some records is the sum of their totals, divided by the sum of their weights. Of `exact_match` a total
    is 1 or 0, and the weight is 1. Of `loss` a total is minus the sum of the losses of the record's labels, and the
    weight their number. A record has the same weight under every configuration.
    """

    total: float
    weight: int


class Evaluate(Protocol):
    """The function that a searcher calls: it returns the metric of a configuration; larger is better.

    `samples` uses this many records of the validation set, the first in one seeded order that is drawn once
    for the search (Algorithm 1's proxy set D_M); None uses them all. Values are stored on disk, record by record. So a
    deterministic searcher that is killed repeats its calls, no record is evaluated twice with a configuration, and to
    ask for more samples evaluates the new records only. What `first_order` returns is not stored.
    """

    def __call__(self, choice: RankConfig, samples: int | None = None) -> float: ...

    def each(self, choice: RankConfig, samples: int | None = None) -> Sequence[RecordValue]:
        """Return the values of the single records, in their order: fewer than `samples` where there are fewer."""
        ...

    def within(self, seconds: float | None) -> bool:
        """Return whether this search's evaluations took less time than this so far; None is no limit.

        Values that are known, and `first_order`, cost none. The time is stored with the values. So a searcher that is
        killed and repeats its calls gets the same answers.
        """
        ...

    def first_order(self, samples: int | None = None) -> Sequence[Sequence[float]]:
        """Return, for each group and each of its ranks, how much the mean loss of a label changes if that group alone
        takes that rank and all others take their largest, to first order: positive where the loss rises, 0 at the
        largest rank.

        That is −⟨∂loss/∂Δ, Δ_R − Δ_r⟩ at the largest ranks R, Δ being the deltas of the group's members. The loss is
        that of the records' answers, whatever the search's metric. For searchers whose `needs_gradients` is true.
        """
        ...


class ModelReader(Protocol):
    """A finished model as an exporter sees it, one tensor at a time: its weights as floats, and the codes of
    quantized layers."""

    @property
    def folder(self) -> Path:
        """The folder of the model. It must not be changed."""
        ...

    def names(self) -> Sequence[str]:
        """Return its parameters as a checkpoint of the float model names them: a quantized layer's weight is
        "{layer}.weight", or part of the tensor in which such a checkpoint joins all experts."""
        ...

    def tensor(self, name: str) -> Tensor:
        """Return one parameter, or one of `floats`, in the shape of such a checkpoint. Where a layer is quantized, it
        has the values that the codes stand for, in the precision of the float weights."""
        ...

    def floats(self) -> Sequence[str]:
        """Return what a folder of codes holds beside them, by its names: where an expert is quantized, the float layers
        of its mixture one by one."""
        ...

    def quantized(self) -> Sequence[str]:
        """Return the quantized layers; a float model has none."""
        ...

    def codes(self, layer: str) -> Quantized:
        """Return the codes [out, in] and the grid of a quantized layer."""
        ...

    def float_layers(self) -> Sequence[str]:
        """Return the linear layers in the model's blocks that are not quantized, by every name that a reader may know:
        the one in the checkpoint and, where that differs, the one of transformers' module."""
        ...

    def blocks(self) -> str:
        """Return the module that is the list of the decoder blocks."""
        ...

    def towers(self) -> Sequence[str]:
        """Return the modules outside the text model, which are not quantized: towers for images, video and sound."""
        ...

    def copy_settings(self, folder: Path) -> None:
        """Copy everything besides the weights: config.json without `quantization_config`, tokenizer, chat template,
        generation config, custom code, licence."""
        ...


class Select(Protocol):
    """The function that a scorer calls in `prune`: which weights of a layer are kept, by the recipe's pattern."""

    def __call__(self, scores: Tensor) -> Tensor:
        """Return bool [out, some], true where kept, for the scores [out, some] of consecutive columns. With N:M, their
        number is a multiple of M. The layer's sparsity holds among them."""
        ...


Indices = tuple[int, ...]
"""A rank configuration, as a position in each group's list of ranks."""
SPARSITY_TOLERANCE = 0.005
"""Largest difference between the sparsity that was asked for and that of all allocated layers together."""
COMPARED_EXAMPLES = 4
"""Examples on which the logits of a merged model are compared with those of the adapted one."""
COMPARED_TOKENS = 32
"""Tokens of each example that are compared where one block at a time is in memory: a large vocabulary's logits take
half a megabyte a token."""
HESSIAN_BYTES = 4 << 30
"""Largest number of bytes of Hessians in memory at once, when layers are compressed one input after the other."""
