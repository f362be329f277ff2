"""`importance`: ranks by what the trained deltas, or the loss, lose there, under a budget of parameters."""

from __future__ import annotations

from random import Random
from typing import Literal

from pydantic import Field

from sqft.api import Evaluate, RankConfig, SearchSpace
from sqft_search.budget import Budgeted


class Importance(Budgeted):
    """The ranks at which least is lost, within a budget of parameters; no configuration is evaluated.

    The sum over all groups of what each loses at its rank r, with R its largest, is minimized. By the signal `delta`
    that is ‖Δ_R − Δ_r‖² (Frobenius, summed over its layers): it looks at the deltas alone, not at the inputs that the
    layers see, and not at what a merger makes of the delta. By `gradient` it is the change of the records' loss to
    first order, −⟨∂loss/∂Δ, Δ_R − Δ_r⟩, from a backward pass for each example at the largest ranks. It is less than 0
    where the smaller rank has the lower loss, and it knows nothing of how one group makes up for another.
    """

    name = "importance"
    signal: Literal["delta", "gradient"] = Field(
        "delta", description="what a rank is judged by: the size of the delta, or the gradient of the records' loss"
    )
    samples: int | None = Field(
        64, ge=1, description="records that `gradient` reads; null uses all; `delta` reads none"
    )

    def needs_gradients(self) -> bool:
        return self.signal == "gradient"

    def search(self, space: SearchSpace, evaluate: Evaluate, rng: Random) -> RankConfig:
        losses = evaluate.first_order(self.samples) if self.needs_gradients() else [g.losses for g in space.groups]
        return self.within_budget(space, losses)
