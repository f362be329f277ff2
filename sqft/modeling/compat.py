"""Names of torch and transformers that are not public, each behind a function of ours.

`tests/modeling/test_compat.py` fails when one of them moves, and says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


def fake_tensors() -> AbstractContextManager[Any]:
    """Run what is inside on tensors that have shapes and no values, a model on the meta device included."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def int4_layout(codes: Tensor) -> Tensor:
    """Lay codes [out, in], int32 in [0, 15], out for `int4_linear`."""
    laid_out: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return laid_out


def int4_linear(x: Tensor, laid_out: Tensor, group_size: int, pairs: Tensor) -> Tensor:
    """Compute x Wᵀ [rows, out] of x [rows, in] on the CPU, bfloat16.

    `pairs` [groups, out, 2] holds scale and offset of each group: a code q is worth (q − 8) · scale + offset.
    """
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, laid_out, group_size, pairs)
    return product


def keep_out_of_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Make torch's DistributedDataParallel leave these parameters and buffers of a module alone."""
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def gate_of(fused: Any) -> Callable[[Tensor], Tensor]:
    """Return what a mixture's experts do with the outputs of gate and up, [tokens, 2 · inner] → [tokens, inner]."""
    gate: Callable[[Tensor], Tensor] = fused._apply_gate
    return gate
