"""Values that pass between the core and components. No torch at import: it appears only in annotations."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

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


SPARSITY_TOLERANCE = 0.005
"""Largest difference between the sparsity that was asked for and that of all allocated layers together."""
COMPARED_EXAMPLES = 4
"""Examples on which the logits of a merged model are compared with those of the adapted one."""
COMPARED_TOKENS = 32
"""Tokens of each example that are compared where one block at a time is in memory: a large vocabulary's logits take
half a megabyte a token."""
HESSIAN_BYTES = 4 << 30
"""Largest number of bytes of Hessians in memory at once, when layers are compressed one input after the other."""
