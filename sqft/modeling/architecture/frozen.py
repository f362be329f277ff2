"""A model that does not train, and whose head is quick all the same."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

M = TypeVar("M", bound=PreTrainedModel)


def freeze(model: M) -> M:
    """Let no parameter of a model train, in place; return the model.

    Its head then gets its inputs row after row in memory. In generation they are the last tokens of a batch, with a
    prompt between one and the next, and torch multiplies such a batch by a copy of a frozen weight for each row.
    """
    model.requires_grad_(False)
    head = model.get_output_embeddings()
    # torch has no public way to ask which hooks there are, and a model may be frozen twice.
    if isinstance(head, nn.Module) and row_after_row not in head._forward_pre_hooks.values():
        head.register_forward_pre_hook(row_after_row)
    return model


def row_after_row(head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return a layer's inputs, the first of them, [..., in], in the order of memory; what has a keyword stays."""
    if not inputs:
        return inputs
    x: Tensor = inputs[0]
    # Not `is_contiguous`, which is content with any stride of a dimension of one entry; torch's product is not.
    in_order = all(x.stride(at) == x.stride(at + 1) * x.shape[at + 1] for at in range(x.dim() - 2))
    return inputs if in_order else (x.clone(memory_format=torch.contiguous_format), *inputs[1:])
