"""Check a plan against the model's own modules, before any weight is read."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from transformers import PreTrainedModel

from sqft.components.kinds import Allocator, Merger, Quantizer, Scorer
from sqft.errors import StageError
from sqft.modeling.architecture.blocks import linears, shape_of
from sqft.modeling.architecture.experts import Expert
from sqft.modeling.architecture.linears import unsplittable_mixtures
from sqft.modeling.calibration.dry_run import check_walk, uncalled
from sqft.modeling.loading import load_skeleton, load_tokenizer
from sqft.modeling.loading.transformers_io import check_vocabulary, quiet_transformers
from sqft.planning.plan import Plan
from sqft.types import LinearShape, Statistic
from sqft.utils.globs import selected

log = logging.getLogger("sqft")

SHOWN = 5
"""Layers that a message names."""

Layers = Mapping[str, Sequence[LinearShape]]
"""Layers that a recipe names, by the place that names them: "sparsify.include", …"""


@quiet_transformers()
def check_fit(plan: Plan) -> None:
    """Check that every layer the recipe names is a linear layer of the model, of the shape that the plan expects.

    The plan reads names and shapes from file headers; only the module tree says which tensors are linear layers inside
    decoder blocks, and whether calibration and PEFT can reach them.

    Raises:
        ModelError: when the model has no decoder blocks, or fewer rows than its tokenizer knows tokens.
        StageError: when the model does not fit the recipe; the message names the layers.
    """
    model = load_skeleton(plan.model_spec)
    if plan.source.kind != "gguf":  # a GGUF file would have to be read completely for its tokenizer
        check_vocabulary(model, load_tokenizer(plan.model_spec), plan.source.path)
    layers = _named_layers(plan)
    _check_experts(plan, model, layers)
    _check_layers(model, layers)
    if plan.recipe.finetune:
        _check_peft(plan, model, [layer.name for layer in layers["finetune.targets"]])
    if calibrated := _calibrated_places(plan):
        check_walk(model, {layer.name: place for place in calibrated for layer in layers[place]})


def _named_layers(plan: Plan) -> Layers:
    """Return the layers that each section of the recipe names, as the headers have them."""
    recipe = plan.recipe
    patterns: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
    if recipe.sparsify:
        patterns["sparsify.include"] = recipe.sparsify.include, recipe.sparsify.exclude
    if recipe.quantize:
        patterns["quantize.include"] = recipe.quantize.include, recipe.quantize.exclude
    if recipe.finetune:
        patterns["finetune.targets"] = recipe.finetune.targets, ()
    return {
        place: [layer for layer in plan.source.linears if selected(layer.name, include, exclude)]
        for place, (include, exclude) in patterns.items()
    }


def _check_layers(model: PreTrainedModel, layers: Layers) -> None:
    """Check that the named layers are linear layers inside decoder blocks, each with a weight of its own.

    Raises:
        StageError: naming the first few that are not.
    """
    problems = [f"{place}: {problem}" for place, named in layers.items() for problem in _problems(model, named)]
    if problems:
        more = [f"… and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        head = "sqft works on linear layers inside one decoder block each; exclude what this recipe names besides:"
        raise StageError("\n  ".join([head, *problems[:SHOWN], *more]))


def _problems(model: PreTrainedModel, named: Sequence[LinearShape]) -> Iterator[str]:
    """Describe each layer that is no linear layer of the model, has another shape, or shares its weight."""
    actual, modules = linears(model), dict(model.named_modules())
    sharing: dict[int, list[str]] = {}
    for name, linear in actual.items():
        sharing.setdefault(id(linear.weight), []).append(name)
    for layer in named:
        if layer.name in actual:
            shape = shape_of(layer.name, actual[layer.name])
            if shape == layer:
                if others := [name for name in sharing[id(actual[layer.name].weight)] if name != layer.name]:
                    yield f"{layer.name} is one weight with {others[0]}"
                continue
            what = f"is a linear layer {_size(shape)}"
        elif layer.name in modules:
            what = f"is {type(modules[layer.name]).__name__}"
        else:
            what = "does not exist"
        yield f"{layer.name} {_size(layer)} {what} in {type(model).__name__}"


def _check_peft(plan: Plan, model: PreTrainedModel, targets: list[str]) -> None:
    """Check that stock PEFT can apply an adapter that stays beside its base.

    Raises:
        StageError: when it cannot.
    """
    merger = plan.step("finetune").component(Merger)
    if merger.merges:
        return
    from peft import LoraConfig, get_peft_model

    if missed := uncalled(model, targets):
        raise StageError(
            f"finetune.targets: {type(model).__name__} does not call {missed[0]}, and PEFT, for which '{merger.name}' "
            "writes its adapter, changes what is called; leave it out, or use a merger that merges"
        )
    try:
        get_peft_model(copy.deepcopy(model), LoraConfig(r=1, target_modules=targets), low_cpu_mem_usage=True)
    except ValueError as error:
        raise StageError(
            f"finetune.targets: PEFT, for which '{merger.name}' writes its adapter, refuses them: {error}"
        ) from error


def _calibrated_places(plan: Plan) -> list[str]:
    """Return the places in the recipe whose layers calibration must reach, because a component needs statistics."""
    needs: dict[str, frozenset[Statistic]] = {}
    for step in plan.steps:
        for resolved in step.components.values():
            if isinstance(resolved.component, Scorer | Allocator | Quantizer):
                place = f"{step.stage}.include"
                needs[place] = needs.get(place, frozenset()) | resolved.component.needs
    return [place for place, statistics in needs.items() if statistics]


def _check_experts(plan: Plan, model: nn.Module, layers: Layers) -> None:
    """Log which mixtures of experts stay as they are, and check that checkpoints can hold what the recipe makes of the
    others.

    Raises:
        StageError: when stock PEFT cannot name an adapted expert, or sqft cannot write an expert's codes.
    """
    for name, weights in unsplittable_mixtures(model).items() if layers else ():
        log.warning("%s is left unchanged: its experts (%d weights) cannot be split", name, weights)
    experts = {name for name, module in model.named_modules() if isinstance(module, Expert)}
    adapted = [layer for layer in layers.get("finetune.targets", ()) if layer.name.rpartition(".")[0] in experts]
    merger = plan.step("finetune").component(Merger) if plan.recipe.finetune else None
    if adapted and merger and not merger.merges:
        raise StageError(
            f"finetune.targets names {adapted[0].name}, and stock PEFT, for which '{merger.name}' writes its adapter, "
            "cannot adapt a single expert; use a merger that merges, or targets outside the experts (full names with *)"
        )
    of_experts = [layer for layer in plan.source.linears if layer.name.rpartition(".")[0] in experts]
    if plan.recipe.quantize and any(f"{layer.name}.weight" not in plan.source.shapes for layer in of_experts):
        raise StageError(
            f"quantize: checkpoints of {type(model).__name__} hold their experts under other names, and sqft cannot "
            "write codes for it yet; remove quantize"
        )


def _size(layer: LinearShape) -> str:
    return f"[{layer.out_features}, {layer.in_features}]"
