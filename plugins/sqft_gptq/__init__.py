"""Quantizers: GPTQ that keeps pruned weights at zero (paper §2.1), and round to nearest. An exporter for their
codes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, model_validator

from sqft.api import (
    Exporter,
    LinearShape,
    LinearStats,
    ModelReader,
    Quantized,
    Quantizer,
    ShardSize,
    StageError,
    float_layers,
    gptq_config,
    gptq_incompatibility,
    hookimpl,
    parameters,
    write_gptq_config,
    write_shards,
)

if TYPE_CHECKING:
    from torch import Tensor


class _OnGrid(Quantizer):
    """The options of the grid, which both quantizers share."""

    gives_compensated = True
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = Field(
        128, description="inputs that share one scale; -1: all inputs of a row"
    )
    symmetric: bool = Field(
        True,
        description="put the zero point in the middle of the codes, which all runtimes read; false fits ranges better",
    )
    clip: bool = Field(False, description="search for the range of each group that has the smallest error")

    def incompatibility(self, linear: LinearShape) -> str | None:
        return gptq_incompatibility(linear, self.bits, self.group_size)

    def _round(self, weight: Tensor, mask: Tensor | None) -> Quantized:
        from sqft_gptq.solver import round_to_nearest

        return round_to_nearest(weight, mask, self.bits, self.group_size, self.symmetric, self.clip)


class Rtn(_OnGrid):
    """Round each weight to the nearest value of its group's grid, without using any data."""

    name = "rtn"
    needs = frozenset()

    def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
        return self._round(weight, mask)


class Gptq(_OnGrid):
    """GPTQ (Frantar et al., ICLR 2023): the weights that are still to come compensate for each rounding error.

    Pruned weights stay exactly zero, because only kept weights compensate. With nothing pruned it is plain GPTQ.
    """

    name = "gptq"
    damp: float = Field(0.01, gt=0, le=1e6, description="added to the Hessian's diagonal, as a fraction of its mean")
    act_order: bool = Field(False, description="quantize the inputs with the largest activations first")
    static_groups: bool = Field(False, description="with act_order, keep groups contiguous")
    reorder_groups: bool = Field(
        True, description="without act_order, quantize the groups with the largest activations first; any reader works"
    )
    refine: int = Field(
        0, ge=0, le=20, description="passes over the inputs afterwards, in which each takes its best codes again"
    )
    refine_damp: float = Field(
        0.5,
        ge=0,
        le=1e6,
        description="with refine, added to the Hessian's diagonal, as a fraction of each of its entries",
    )
    target: Literal["sparse", "dense"] = Field(
        "sparse", description="with refine, the weight to match: as it was quantized, or as it was before pruning"
    )

    @model_validator(mode="after")
    def _of_refinement(self) -> Self:
        """Refuse options of the refinement where there is none."""
        for name in () if self.refine else ("refine_damp", "target"):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f'{name} has no effect without refine; remove it, or set "refine" to 1 or more')
        return self

    def needs_dense(self) -> bool:
        return self.target == "dense"

    def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
        from sqft.kernels.finite import all_finite
        from sqft.kernels.hessian import inverse_factor
        from sqft_gptq.refinement import refine, shrunk
        from sqft_gptq.solver import GroupOrder, gptq

        H = stats.hessian
        if H is None or not all_finite(H):
            raise StageError("gptq needs a finite Hessian; use float32, or other calibration text")
        size = weight.shape[1] if self.group_size == -1 else self.group_size
        grid = self._round(weight, mask).grid if self.static_groups else None
        turns = GroupOrder.of(H.diagonal(), size, self.act_order, self.reorder_groups, grid)
        try:
            U = inverse_factor(H[turns.order][:, turns.order], self.damp)
        except ValueError as error:
            raise StageError(str(error)) from error
        result = gptq(
            weight,
            U,
            mask,
            turns,
            bits=self.bits,
            group_size=self.group_size,
            symmetric=self.symmetric,
            clip=self.clip,
        )
        if not self.refine:
            return result
        target = stats.dense if self.needs_dense() else weight
        assert target is not None
        return refine(result, target, shrunk(H, self.refine_damp), mask, turns.order, self.refine)


class GptqCheckpoint(Exporter):
    """A GPTQ checkpoint, version 1: packed codes, zero points minus one, float16 scales, the group of each input.

    `lm_head.weight` is stored even where it is tied: a reader that does not tie it would silently load zeros.
    """

    name = "gptq"
    needs_codes = True
    max_shard_size: ShardSize = "5GB"

    def export(self, model: ModelReader, folder: Path) -> None:
        from sqft.kernels.packing import to_gptq

        model.copy_settings(folder)
        grids = {layer: model.codes(layer).grid for layer in model.quantized()}
        write_gptq_config(folder, gptq_config(grids, float_layers(model), model.towers(), model.blocks()))
        write_shards(parameters(model, to_gptq), folder, self.max_shard_size)


@hookimpl
def sqft_exporters() -> Iterator[type[Exporter]]:
    yield GptqCheckpoint


@hookimpl
def sqft_quantizers() -> Iterator[type[Quantizer]]:
    yield from (Gptq, Rtn)
