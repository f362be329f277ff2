"""The training loss, computed only where there are labels."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sqft.data.encoding import IGNORED
from sqft.errors import StageError
from sqft.modeling.compat import keep_out_of_ddp


@torch.no_grad()
def sees_across(model: nn.Module) -> bool:
    """Return whether an example in a packed row sees those before it, as positions do not keep the two apart."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return True
    device = next(model.parameters()).device
    ids = torch.arange(2, 10, device=device)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=device)
    training = model.training
    model.eval()
    alone = model(input_ids=ids[:, 4:], use_cache=False).logits
    packed = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 4:] - alone
    # Compared with the effect of a mask of ones, by which transformers takes the row for one sequence.
    everything = {"attention_mask": torch.ones_like(ids), "position_ids": positions}
    across = model(input_ids=ids, use_cache=False, **everything).logits[:, 4:] - alone
    model.train(training)
    return float(packed.abs().max()) > 0.1 * float(across.abs().max())


class CompletionLoss(nn.Module):
    """A causal LM as transformers' Trainer sees it: batches in, loss out.

    The head runs only at positions where some row has a label: with a vocabulary of 49k and short
    completions that is a large part of a step. With `chunk` it runs for that many labels at a time, and
    again in the backward pass: only the logits of one chunk are ever in memory. The state dict holds only
    what trains, and so do Trainer's checkpoints.
    """

    accepts_loss_kwargs = True
    """Read by Trainer: it passes `num_items_in_batch`, so that accumulated batches are weighted by their labels."""

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        super().__init__()
        self.model, self.chunk = model, chunk
        frozen = [name for name, parameter in self.named_parameters() if not parameter.requires_grad]
        # Every process has these already, and no forward sends packed codes around.
        keep_out_of_ddp(self, [*frozen, *(name for name, _ in self.named_buffers())])
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
    ) -> dict[str, Tensor]:
        """Compute the sum of the labels' cross-entropies, divided by `num_items_in_batch` or by their number.

        Args:
            input_ids: [batch, tokens].
            labels: [batch, tokens], `IGNORED` where there is none.
            attention_mask: [batch, tokens].
            position_ids: [batch, tokens]; without a mask, positions that begin at 0 again begin an example of their
                own.
            num_items_in_batch: labels in all accumulated batches.
        """
        targets = labels[:, 1:]
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        given = {name: tensor for name, tensor in inputs.items() if tensor is not None}
        total = self._in_chunks(given, targets) if self.chunk else self._at_once(given, targets)
        return {"loss": total / count}

    def _at_once(self, given: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Compute the sum of cross-entropies from the logits of all positions where some row has a label."""
        positions = (targets != IGNORED).any(0).nonzero().squeeze(1)  # where the next token has a label
        only = {"logits_to_keep": positions} if self._keeps else {}
        logits = self.model(**given, use_cache=False, **only).logits
        if not self._keeps:
            logits = logits[:, positions]
        return _summed(logits.flatten(0, 1), targets[:, positions].reshape(-1))

    def _in_chunks(self, given: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """Compute the sum of cross-entropies with the logits of `chunk` labels at a time, in backward too."""
        hidden, head = self._before_head(given)  # [batch, tokens, hidden]
        labelled = targets != IGNORED
        rows_and_labels = (hidden[:, :-1][labelled], targets[labelled])  # [labels, hidden] and [labels]
        parts = zip(*(torch.split(tensor, self.chunk or 1) for tensor in rows_and_labels), strict=True)

        def part(rows: Tensor, wanted: Tensor) -> Tensor:
            return _summed(head(rows), wanted)

        # Nothing is drawn at random in a head, so no generator's state needs to be kept.
        losses = [checkpoint(part, *pair, use_reentrant=False, preserve_rng_state=False) for pair in parts]
        return torch.stack(losses).sum()

    def _before_head(self, given: Mapping[str, Tensor]) -> tuple[Tensor, nn.Module]:
        """Return the head's input [batch, tokens, hidden], and the head."""
        model: Any = self.model
        states = model.base_model(**given, use_cache=False)
        return states.last_hidden_state, model.get_output_embeddings()

    @torch.no_grad()
    def check_head(self, input_ids: Tensor) -> None:
        """Check on `input_ids` [batch, tokens] that the model's logits are its head's, and can be computed in chunks.

        Raises:
            StageError: when the model changes them afterwards, as Gemma 2 does, or hides its head.
        """
        given = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        wanted = self.model(**given, use_cache=False).logits
        try:
            hidden, head = self._before_head(given)
            alike = torch.allclose(head(hidden).float(), wanted.float(), rtol=1e-5, atol=1e-5)
        except (AttributeError, TypeError, RuntimeError):
            alike = False
        if not alike:
            raise StageError(
                f"finetune.loss_chunk: the logits of {type(self.model).__name__} are not what its head computes from "
                "its last hidden states, so they cannot be computed in chunks; remove it"
            )

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        return {name: value for name, value in state.items() if name in trained}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load what trains; frozen parameters are not in a checkpoint, and so not missing from it."""
        result = super().load_state_dict(state_dict, strict=False, assign=assign)
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        result.missing_keys[:] = [name for name in result.missing_keys if name in trained]
        if strict and (result.missing_keys or result.unexpected_keys):
            raise RuntimeError(f"the checkpoint does not fit: {result}")
        return result


def _summed(logits: Tensor, targets: Tensor) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
