"""A mask that another model already has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from sqft.api import SPARSITY_TOLERANCE, InputPath, LinearStats, Scorer, Select, SqftError, StageError, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class Mask(Scorer):
    """The mask of another model of the same shape: what is zero there is pruned, and the weights are this model's."""

    name = "mask"
    needs = frozenset()
    folder: Annotated[str, InputPath(folder=True)] = Field(
        description="folder of that model, in Hugging Face layout, as floats; it must have the recipe's pattern and "
        "sparsity in each layer"
    )

    def prune(self, weight: Tensor, stats: LinearStats, select: Select) -> tuple[Tensor, Tensor]:
        if stats.weight_in is None:
            raise StageError("scorer 'mask' works in the stage sparsify alone, which reads the other model for it")
        option = "sparsify.scorer.options.folder"
        try:
            other = stats.weight_in(Path(self.folder))
        except SqftError as error:
            raise StageError(f"{option}: {error}") from error
        place = f"{option}: {stats.name}.weight in {self.folder}"
        if other.shape != weight.shape:
            raise StageError(
                f"{place} has the shape {list(other.shape)}, expected {list(weight.shape)}; name a model of the same "
                "architecture and size"
            )
        other = other.to(weight)
        mask = select(other.abs())
        # A kept weight may have become zero. A pruned one cannot have become anything else.
        lost, spare = int((~mask & (other != 0)).sum()), int((mask & (other == 0)).sum())
        if lost or spare > SPARSITY_TOLERANCE * mask.numel():
            zeros = 1 - other.count_nonzero().item() / other.numel()
            raise StageError(
                f"{place} has {zeros:.4f} zeros, which are not those of the recipe's pattern and sparsity "
                f"({lost} weights of it would be pruned, {spare} zeros kept); set sparsify.pattern and "
                f"sparsify.sparsity to what that model was pruned with, here {zeros:.6g} (the allocator 'explicit' "
                "gives a layer its own), or leave out the layer"
            )
        return weight.masked_fill(~mask, 0), mask


@hookimpl
def sqft_scorers() -> Iterator[type[Scorer]]:
    yield Mask
