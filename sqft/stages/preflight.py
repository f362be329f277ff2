"""Check what only a model's modules can show, before any weight is read."""

from __future__ import annotations

from sqft.components.kinds import Merger
from sqft.errors import StageError
from sqft.modeling.loading import load_skeleton
from sqft.modeling.loading.transformers_io import quiet_transformers
from sqft.planning.plan import Plan


@quiet_transformers()
def check_fit(plan: Plan) -> None:
    """Check that stock PEFT can apply an adapter that stays beside its base.

    Raises:
        StageError: when PEFT refuses it.
    """
    if not plan.recipe.finetune or (merger := plan.step("finetune").component(Merger)).merges:
        return
    from peft import LoraConfig, get_peft_model

    targets = list(plan.step("finetune").layers)
    try:
        get_peft_model(load_skeleton(plan.model_spec), LoraConfig(r=1, target_modules=targets), low_cpu_mem_usage=True)
    except ValueError as error:
        raise StageError(
            f"finetune.targets: PEFT, for which '{merger.name}' writes its adapter, refuses them: {error}"
        ) from error
