"""gptqmodel's GPTQ as a quantizer of sqft."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from sqft.api import Grid, LinearShape, LinearStats, Quantized, Quantizer, StageError, gptq_incompatibility, hookimpl

if TYPE_CHECKING:
    from torch import Tensor


class GptqModel(Quantizer):
    """GPTQ by gptqmodel, layer by layer, on the statistics that sqft collects.

    gptqmodel knows no mask. Its error compensation changes pruned weights, and here they are set back to zero
    afterwards. So their part of the compensation is lost; sqft's own `gptq` does not lose it.
    """

    name = "gptqmodel"
    bits: Literal[2, 3, 4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 128
    symmetric: bool = True
    damp: float = Field(0.05, gt=0, lt=1, description="added to the Hessian's diagonal, as a fraction of its mean")
    act_order: bool = Field(False, description="quantize the inputs with the largest activations first")
    reorder_groups: bool = Field(
        False, description="quantize the groups with the largest activations first (gptqmodel's act_group_aware)"
    )

    def incompatibility(self, linear: LinearShape) -> str | None:
        return gptq_incompatibility(linear, self.bits, self.group_size)

    def quantize(self, weight: Tensor, mask: Tensor | None, stats: LinearStats) -> Quantized:
        import torch
        from gptqmodel import QuantizeConfig
        from gptqmodel.quantization.gptq import GPTQ

        from sqft.kernels.grids import group_index, quantize

        if stats.hessian is None or not stats.tokens:
            raise StageError("gptqmodel needs a Hessian from calibration text")
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
        linear.weight.data = weight if mask is None else weight * mask
        settings = QuantizeConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.symmetric,
            damp_percent=self.damp,
            desc_act=self.act_order,
            act_group_aware=self.reorder_groups,
        )
        task = GPTQ(linear, settings)
        task.quantizer.configure(perchannel=True)
        task.H = stats.hessian * (2 / stats.tokens)
        task.nsamples = stats.tokens
        value, scale, zero, index, *_ = task.quantize()
        groups = index.int() if self.act_order else None
        grid = Grid(scale.float(), zero.round().int(), self.group_size, self.bits, groups)
        codes = quantize(value.float(), grid)
        stored = Grid(scale.half(), grid.zero, self.group_size, self.bits, groups)
        if mask is not None:
            at = group_index(grid, weight.shape[1])
            codes = torch.where(mask, codes, grid.zero[:, at].to(codes.dtype))
        return Quantized(codes, stored)


@hookimpl
def sqft_quantizers() -> Iterator[type[Quantizer]]:
    yield GptqModel
