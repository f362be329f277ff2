"""The training loss, computed only where there are labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sqft.data.prompts import IGNORED


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
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        self._ddp_params_and_buffers_to_ignore = [*frozen, *(name for name, _ in self.named_buffers())]
        """torch's word for: every process has these already, and no forward sends packed codes around."""
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """The sum of cross-entropies over labels, over `num_items_in_batch` or their own number.

        `input_ids`, `attention_mask`, `labels` [batch, tokens].
        """
        targets = labels[:, 1:]
        positions = (targets != IGNORED).any(0).nonzero().squeeze(1)  # where the next token has a label
        only = {"logits_to_keep": positions} if self._keeps else {}
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **only).logits
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
