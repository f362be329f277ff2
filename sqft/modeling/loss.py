"""The training loss, computed only where there are labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sqft.data.prompts import IGNORED


@torch.no_grad()
def sees_across(model: nn.Module) -> bool:
    """Whether an example in a packed row sees those before it, or the model cannot be told where one begins."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return True
    device = next(model.parameters()).device
    ids = torch.arange(2, 10, device=device)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    training = model.training
    model.eval()
    alone = model(input_ids=ids[:, 4:], use_cache=False).logits
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:] - alone
    # The measure is what a mask of ones lets through: it tells transformers that the row is one sequence.
    everything = {"attention_mask": torch.ones_like(ids), "position_ids": positions}
    across = model(input_ids=ids, use_cache=False, **everything).logits[:, 4:] - alone
    model.train(training)
    return float(packed.abs().max()) > 0.1 * float(across.abs().max())


class CompletionLoss(nn.Module):
    """A causal LM as transformers' Trainer sees it: batches in, loss out.

    The head runs only at positions where some row has a label: with a vocabulary of 49k and short
    completions that is a large part of a step. The state dict holds only what trains, and so do
    Trainer's checkpoints.
    """

    accepts_loss_kwargs = True
    """Trainer's word for: pass `num_items_in_batch`, so that accumulated batches weigh by their labels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The sum of cross-entropies over labels, over `num_items_in_batch` or their own number.

        `input_ids`, `labels`, `attention_mask` or `position_ids` [batch, tokens]; without a mask, positions that begin
        at 0 again begin an example of their own.
        """
        targets = labels[:, 1:]
        positions = (targets != IGNORED).any(0).nonzero().squeeze(1)  # where the next token has a label
        given = {"attention_mask": attention_mask, "position_ids": position_ids}
        given |= {"logits_to_keep": positions} if self._keeps else {}
        given = {name: value for name, value in given.items() if value is not None}
        logits = self.model(input_ids=input_ids, use_cache=False, **given).logits
        if not self._keeps:
            logits = logits[:, positions]
        targets = targets[:, positions].reshape(-1)
        total = F.cross_entropy(logits.float().flatten(0, 1), targets, ignore_index=IGNORED, reduction="sum")
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
        return {"loss": total / count}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what trains; the frozen rest is not in a checkpoint and so not missing from it."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        result.missing_keys[:] = [name for name in result.missing_keys if name in trained]
        if strict and (result.missing_keys or result.unexpected_keys):
            raise RuntimeError(f"the checkpoint does not fit: {result}")
        return result
