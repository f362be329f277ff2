"""The training loss, computed only where there are labels."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

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


class Prediction(NamedTuple):
    """What a teacher predicts at some labels: `probabilities` [labels, k + 1] of `tokens` [labels, k], and last of all
    other tokens together; or, without tokens, of the whole vocabulary, [labels, vocabulary]."""

    probabilities: Tensor
    tokens: Tensor | None = None


@dataclass(frozen=True)
class Distillation:
    """How a teacher's predictions count: the loss is (1 - w) · cross-entropy + w · T² · KL, at temperature T."""

    weight: float
    temperature: float


def predict(logits: Tensor, temperature: float, top_k: int | None = None) -> Prediction:
    """Return the prediction that logits [labels, vocabulary] are, of the `top_k` most probable tokens or of all."""
    logits = _wide(logits) / temperature
    if top_k is None or top_k >= logits.shape[-1]:
        return Prediction(logits.softmax(-1))
    tokens = logits.topk(top_k).indices
    return Prediction(_grouped(logits, tokens).softmax(-1), tokens)


def divergence(teacher: Prediction, logits: Tensor, temperature: float) -> Tensor:
    """Compute the sum over the labels of KL(teacher ‖ student), of the student's logits [labels, vocabulary].

    It is a KL divergence on the outcomes that the teacher's prediction tells apart, so never more than the one on the
    whole vocabulary. The student may have more rows than the teacher: a teacher never predicts those.
    """
    logits = _wide(logits) / temperature
    outcomes = logits if teacher.tokens is None else _grouped(logits, teacher.tokens.long())
    log_student = outcomes.log_softmax(-1)[:, : teacher.probabilities.shape[1]]
    return F.kl_div(log_student, teacher.probabilities.to(log_student.dtype), reduction="sum")


def _grouped(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the logits [labels, k + 1] of `tokens` [labels, k] and of all others as one outcome."""
    others = logits.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([logits.gather(1, tokens), others], 1)


class CompletionLoss(nn.Module):
    """A causal LM as transformers' Trainer sees it: batches in, loss out.

    The head runs only at positions where some row has a label: with a vocabulary of 49k and short
    completions that is a large part of a step. With `chunk` it runs for that many labels at a time, and
    again in the backward pass: only the logits of one chunk are ever in memory. The state dict holds only
    what trains, and so do Trainer's checkpoints.

    With `distillation`, batches may hold a teacher's prediction at every label, in the order of the labels. The sum of
    the divergences from it is added up in `divergence`, divided as the loss is, until someone takes it.
    """

    accepts_loss_kwargs = True
    """Read by Trainer: it passes `num_items_in_batch`, so that accumulated batches are weighted by their labels."""

    def __init__(self, model: nn.Module, chunk: int | None = None, distillation: Distillation | None = None) -> None:
        super().__init__()
        self.model, self.chunk, self.distillation = model, chunk, distillation
        self.divergence: Tensor | float = 0.0
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
        probabilities: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the sum of the labels' losses, divided by `num_items_in_batch` or by their number.

        Args:
            input_ids: [batch, tokens].
            labels: [batch, tokens], `IGNORED` where there is none.
            attention_mask: [batch, tokens].
            position_ids: [batch, tokens]; without a mask, positions that begin at 0 again begin an example of their
                own.
            num_items_in_batch: labels in all accumulated batches.
            probabilities: a teacher's `Prediction` at the labels, row after row; None to learn the labels alone.
            tokens: which those are of.
        """
        targets = labels[:, 1:]
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
        given = self._given(input_ids, attention_mask, position_ids)
        teacher = None if probabilities is None else Prediction(probabilities, tokens)
        total = self._in_chunks(given, targets, teacher) if self.chunk else self._at_once(given, targets, teacher)
        if teacher is not None and self.distillation is not None:
            w, T = self.distillation.weight, self.distillation.temperature
            cross_entropy, kl = total
            self.divergence += kl.detach() / count
            total = (1 - w) * cross_entropy + w * T**2 * kl
        return {"loss": total / count}

    @torch.no_grad()
    def logits(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor) -> Iterator[Tensor]:
        """Yield the logits [labels, vocabulary] that predict the labels, row after row, `chunk` labels at a time.

        Args:
            input_ids: [batch, tokens].
            labels: [batch, tokens], `IGNORED` where there is none.
            attention_mask: [batch, tokens].
        """
        given, labelled = self._given(input_ids, attention_mask, None), labels[:, 1:] != IGNORED
        if self.chunk:
            hidden, head = self._before_head(given)
            yield from map(head, torch.split(hidden[:, :-1][labelled], self.chunk))
        else:
            logits, positions = self._labelled_columns(given, labelled)
            yield logits[labelled[:, positions]]

    @staticmethod
    def _given(input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> dict[str, Tensor]:
        """Return those of a model's inputs that there are."""
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        return {name: tensor for name, tensor in inputs.items() if tensor is not None}

    def _labelled_columns(self, given: Mapping[str, Tensor], labelled: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [batch, columns, vocabulary] where some row is `labelled` [batch, tokens - 1], and where that
        is."""
        positions = labelled.any(0).nonzero().squeeze(1)  # where the next token has a label
        only = {"logits_to_keep": positions} if self._keeps else {}
        logits = self.model(**given, use_cache=False, **only).logits
        return logits if self._keeps else logits[:, positions], positions

    def _at_once(self, given: Mapping[str, Tensor], targets: Tensor, teacher: Prediction | None) -> Tensor:
        """Compute the sums of `_summed` from the logits of all positions where some row has a label."""
        labelled = targets != IGNORED
        logits, positions = self._labelled_columns(given, labelled)
        if teacher is None:
            return self._summed(logits.flatten(0, 1), targets[:, positions].reshape(-1))
        logits = logits[labelled[:, positions]]  # frees the other ones
        return self._summed(logits, targets[labelled], *teacher)

    def _in_chunks(self, given: Mapping[str, Tensor], targets: Tensor, teacher: Prediction | None) -> Tensor:
        """Compute the sums of `_summed` with the logits of `chunk` labels at a time, in backward too."""
        hidden, head = self._before_head(given)  # [batch, tokens, hidden]
        labelled = targets != IGNORED
        taught = [tensor for tensor in teacher or () if tensor is not None]
        of_labels = (hidden[:, :-1][labelled], targets[labelled], *taught)  # each [labels, …]
        parts = zip(*(torch.split(tensor, self.chunk or 1) for tensor in of_labels), strict=True)

        def part(rows: Tensor, *wanted: Tensor) -> Tensor:
            return self._summed(head(rows), *wanted)

        # Nothing is drawn at random in a head, so no generator's state needs to be kept.
        sums = [checkpoint(part, *one, use_reentrant=False, preserve_rng_state=False) for one in parts]
        return torch.stack(sums).sum(0)

    def _summed(
        self,
        logits: Tensor,
        targets: Tensor,
        probabilities: Tensor | None = None,
        tokens: Tensor | None = None,
    ) -> Tensor:
        """Compute the sum of the cross-entropies at logits [labels, vocabulary]; with a teacher's prediction, [2]: also
        that of the divergences."""
        cross_entropy = F.cross_entropy(_wide(logits), targets, ignore_index=IGNORED, reduction="sum")
        if probabilities is None or self.distillation is None:
            return cross_entropy
        kl = divergence(Prediction(probabilities, tokens), logits, self.distillation.temperature)
        return torch.stack([cross_entropy, kl])

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


def _wide(logits: Tensor) -> Tensor:
    """Return logits in float32, or wider."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
