"""Check what only a model's modules, its tokenizer and the data sets of tasks can show, before any weight is read."""

from __future__ import annotations

from sqft.components.kinds import Merger
from sqft.errors import StageError
from sqft.modeling.loading import load_skeleton, load_tokenizer
from sqft.modeling.loading.transformers_io import quiet_transformers
from sqft.planning.plan import Plan, Step
from sqft.recipe.sections import Evaluate
from sqft.stages.evaluate import task_settings


@quiet_transformers()
def check_fit(plan: Plan) -> None:
    """Check that stock PEFT can apply an adapter that stays beside its base.

    Raises:
        StageError: when PEFT refuses it.
    """
    if not plan.recipe.finetune or (merger := plan.step("finetune").component(Merger)).merges:
        return
    from peft import LoraConfig, inject_adapter_in_model

    targets = list(plan.step("finetune").layers)
    try:
        config = LoraConfig(r=1, target_modules=targets)
        inject_adapter_in_model(config, load_skeleton(plan.model_spec), low_cpu_mem_usage=True)
    except ValueError as error:
        raise StageError(
            f"finetune.targets: PEFT, for which '{merger.name}' writes its adapter, refuses them: {error}"
        ) from error


@quiet_transformers()
def check_vocabularies(plan: Plan) -> None:
    """Check that a teacher reads and predicts the tokens of the recipe's own model.

    Raises:
        StageError: naming a token that differs.
        ModelError: when a tokenizer cannot be loaded.
    """
    teacher = plan.teacher
    if teacher is not None and teacher.path != plan.source.path:
        from sqft.modeling.training.teacher import check_same_tokens

        check_same_tokens(load_tokenizer(plan.model_spec), load_tokenizer(teacher), teacher.path)


@quiet_transformers()
def check_questions(plan: Plan, step: Step) -> None:
    """Check that lm-eval can load a step's tasks, and ask them as the recipe says.

    Raises:
        StageError: naming a task that cannot be loaded, and its data set, or the setting that does not fit.
    """
    from sqft.modeling.evaluation.harness import ready_tasks

    section, spec = step.section, plan.model_spec
    assert isinstance(section, Evaluate)
    config, tokenizer = load_skeleton(spec).config, load_tokenizer(spec)
    ready_tasks(section.tasks, step.files.get("include_path"), task_settings(plan, section), tokenizer, config)
