"""The plan against the model's own modules, before any weight is read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from sqft.components.kinds import Allocator, Merger, Quantizer, Scorer
from sqft.errors import StageError
from sqft.modeling.architecture.blocks import linears, shape_of
from sqft.modeling.architecture.linears import Expert, fused_experts
from sqft.modeling.calibration.dry_run import check_walk, uncalled
from sqft.modeling.loading.transformers_io import check_vocabulary, load_skeleton, load_tokenizer, quiet_transformers
from sqft.planning.plan import Plan
from sqft.types import LinearShape, Statistic
from sqft.utils.globs import selected

log = logging.getLogger("sqft")


SHOWN = 5


@quiet_transformers()
def check_fit(plan: Plan) -> None:
    """Every layer that the plan took from the headers is a linear layer of the model, of the same shape.

    The plan reads names and shapes of tensors; only the module tree says which of them are linear
    layers inside decoder blocks.

    Raises:
        StageError: when the model has no decoder blocks, when its tokenizer knows more tokens than it has rows for,
            or naming the layers that do not fit.
    """
    recipe = plan.recipe
    model = load_skeleton(plan.model_spec)
    if plan.source.kind != "gguf":  # which would be read whole for it
        tokenizer = load_tokenizer(plan.model_spec)
        check_vocabulary(model, tokenizer, plan.source.path)
    layers = linears(model)
    actual = {name: shape_of(name, linear) for name, linear in layers.items()}
    owners: dict[int, list[str]] = {}
    for name, linear in layers.items():
        owners.setdefault(id(linear.weight), []).append(name)
    wanted: dict[str, list[LinearShape]] = {}
    if recipe.sparsify:
        chosen = [x for x in plan.source.linears if selected(x.name, recipe.sparsify.include, recipe.sparsify.exclude)]
        wanted["sparsify.include"] = chosen
    if recipe.quantize:
        chosen = [x for x in plan.source.linears if selected(x.name, recipe.quantize.include, recipe.quantize.exclude)]
        wanted["quantize.include"] = chosen
    if recipe.finetune:
        wanted["finetune.targets"] = [x for x in plan.source.linears if selected(x.name, recipe.finetune.targets, ())]
    _check_mixtures(plan, model, wanted)
    modules, model_type = dict(model.named_modules()), type(model).__name__
    wrong = []
    for place, named in wanted.items():
        for layer in named:
            if (other := actual.get(layer.name)) == layer:
                others = [name for name in owners[id(layers[layer.name].weight)] if name != layer.name]
                if others:
                    wrong.append(f"{place}: {layer.name} is one weight with {others[0]}")
                continue
            found = type(modules[layer.name]).__name__ if layer.name in modules else "nothing"
            found = f"a linear layer {_size(other)}" if other else found
            wrong.append(f"{place}: {layer.name} {_size(layer)} is {found} in {model_type}")
    if wrong:
        more = [f"… and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        head = "sqft works on linear layers inside one decoder block each; exclude what this recipe names besides:"
        raise StageError("\n  ".join([head, *wrong[:SHOWN], *more]))
    if plan.recipe.finetune:
        _check_peft(plan, model, [layer.name for layer in wanted["finetune.targets"]])
    if walked := _walked(plan):
        check_walk(model, {layer.name: place for place in walked for layer in wanted[place]})


def _check_peft(plan: Plan, model: PreTrainedModel, targets: list[str]) -> None:
    """What an adapter beside its base does here, stock PEFT does with it too."""
    merger = plan.step("finetune").component(Merger)
    if merger.merges:
        return
    from peft import LoraConfig, get_peft_model

    if passed := uncalled(model, targets):
        raise StageError(
            f"finetune.targets: {type(model).__name__} does not call {passed[0]}, and PEFT, for which '{merger.name}' "
            "writes its adapter, changes what is called; leave it out, or use a merger that merges"
        )
    try:
        get_peft_model(copy.deepcopy(model), LoraConfig(r=1, target_modules=targets), low_cpu_mem_usage=True)
    except ValueError as error:
        raise StageError(
            f"finetune.targets: PEFT, for which '{merger.name}' writes its adapter, refuses them: {error}"
        ) from error


def _walked(plan: Plan) -> list[str]:
    """The places in the recipe that name layers which calibration must see."""
    needs: dict[str, frozenset[Statistic]] = {}
    for step in plan.steps:
        for part in step.components.values():
            if isinstance(part.component, Scorer | Allocator | Quantizer):
                place = f"{step.stage}.include"
                needs[place] = needs.get(place, frozenset()) | part.component.needs
    return [place for place, found in needs.items() if found]


def _check_mixtures(plan: Plan, model: nn.Module, wanted: Mapping[str, Sequence[LinearShape]]) -> None:
    """Say what stays dense, and refuse what no checkpoint could hold."""
    for name, weights in fused_experts(model).items() if wanted else ():
        log.warning("%s stays as it is: its experts (%d weights) cannot be taken apart", name, weights)
    experts = {name for name, module in model.named_modules() if isinstance(module, Expert)}
    adapted = [x for x in wanted.get("finetune.targets", ()) if x.name.rpartition(".")[0] in experts]
    merger = plan.step("finetune").component(Merger) if plan.recipe.finetune else None
    if adapted and merger and not merger.merges:
        raise StageError(
            f"finetune.targets names {adapted[0].name}, and stock PEFT, for which '{merger.name}' writes its adapter, "
            "knows no single expert; use a merger that merges, or targets outside the experts (full names with *)"
        )
    renamed = [x for x in plan.source.linears if x.name.rpartition(".")[0] in experts]
    if plan.recipe.quantize and any(f"{x.name}.weight" not in plan.source.shapes for x in renamed):
        raise StageError(
            f"quantize: checkpoints of {type(model).__name__} hold their experts under other names, and sqft cannot "
            "write codes for it yet; remove quantize"
        )


def _size(layer: LinearShape) -> str:
    return f"[{layer.out_features}, {layer.in_features}]"
