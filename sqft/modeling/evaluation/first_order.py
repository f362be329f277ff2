"""How the loss changes where a group of layers takes a smaller rank, to first order: by gradients of gates on ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sqft.data.collators import Collator
from sqft.data.encoding import IGNORED, Example
from sqft.modeling.adapters.adapted_linear import AdaptedLinear
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.evaluation.generation import eval_mode
from sqft.modeling.training.loss import CompletionLoss
from sqft.ranks import RankConfig
from sqft.types import DeltaModule
from sqft.utils.progress import Track


class GatedDelta(nn.Module):
    """A delta that does not train, with a gate on each of its ranks: scale · B diag(gate) A. All gates are 1."""

    def __init__(self, delta: DeltaModule) -> None:
        super().__init__()
        self.ungated, self.rank = delta, delta.rank
        self.gate = nn.Parameter(torch.ones_like(delta.factors(delta.rank)[0][0]))  # [R]

    def factors(self, rank: int) -> tuple[Tensor, Tensor, float]:
        B, A, scale = self.ungated.factors(rank)
        return B.detach() * self.gate[:rank], A.detach(), scale


def first_order_changes(
    adapted: AdaptedModel, loss: CompletionLoss, examples: Sequence[Example], track: Track
) -> tuple[list[list[float]], int]:
    """Compute how much the sum of the labels' losses changes where one group takes a smaller rank, to first order.

    The delta of rank r is Δ_r = s_r Σ_{i<r} bᵢ aᵢᵀ. With gates γ on the ranks of the largest, R, it is
    Δ(γ) = s_R Σᵢ γᵢ bᵢ aᵢᵀ, and ∂loss/∂γᵢ = ⟨∂loss/∂Δ, s_R bᵢ aᵢᵀ⟩ at γ = 1. So, of each member of the group,

        loss(Δ_r) − loss(Δ_R) ≈ −⟨∂loss/∂Δ, Δ_R − Δ_r⟩ = −Σᵢ cᵢ ∂loss/∂γᵢ,

    with cᵢ = 1 − s_r / s_R where r keeps i, and 1 where it does not: positive where the loss rises. (Molchanov et al.,
    Importance Estimation for Neural Network Pruning, 2019, square it; here the sign is kept.) Where the merged weight
    is rounded to a grid, the gradient is the one that training sees, straight through the rounding.

    One example at a time is in memory: activations are kept for the gradients.

    Args:
        adapted: at any ranks; they are then the largest.
        loss: of its model.
        examples: token sequences with labels.
        track: the progress display.

    Returns:
        The change for each group and each of its ranks, and the number of labels.
    """
    groups = adapted.space.groups
    adapted.set_ranks(RankConfig(tuple(max(group.ranks) for group in groups)))
    collate, device, labels = Collator(pad_id=0), next(loss.parameters()).device, 0  # nothing is padded
    with _gated(adapted.layers) as gates, eval_mode(loss):
        sums = {name: torch.zeros(len(gate), dtype=torch.float64) for name, gate in gates.items()}
        for example in track(examples, "gradients", len(examples)):
            batch = {name: tensor.to(device) for name, tensor in collate([example]).items()}
            labels += int((batch["labels"] != IGNORED).sum())
            total = loss(**batch, num_items_in_batch=1)["loss"]
            # An expert that no token was routed to has none.
            for name, grad in zip(gates, torch.autograd.grad(total, [*gates.values()], allow_unused=True), strict=True):
                if grad is not None:
                    sums[name] += grad.double().cpu()
    changes = [
        [sum(_change(adapted.layers[name].delta, sums[name], rank) for name in group.members) for rank in group.ranks]
        for group in groups
    ]
    return changes, labels


def _change(delta: DeltaModule, gradient: Tensor, rank: int) -> float:
    """Compute the change of the loss at a smaller rank from the gradient of the gates [R]."""
    largest, scale = delta.factors(delta.rank)[2], delta.factors(rank)[2]
    taken = torch.ones_like(gradient)
    taken[:rank] -= scale / largest if largest else 1.0  # without a scale there is no delta, and no gradient
    return -float(taken @ gradient)


@contextmanager
def _gated(layers: Mapping[str, AdaptedLinear]) -> Iterator[dict[str, nn.Parameter]]:
    """Put gates on the ranks of all layers, and yield them."""
    ungated = {name: layer.delta for name, layer in layers.items()}
    gated = {name: GatedDelta(delta) for name, delta in ungated.items()}
    try:
        for name, layer in layers.items():
            layer.delta = gated[name]
        yield {name: delta.gate for name, delta in gated.items()}
    finally:
        for name, layer in layers.items():
            layer.delta = ungated[name]
