"""The plan against the model's own modules, before any weight is read."""

from __future__ import annotations

from sqft.contracts import LinearShape
from sqft.errors import StageError
from sqft.modeling.blocks import linears, shape_of
from sqft.modeling.load import skeleton
from sqft.plan import Plan, selected

SHOWN = 5


def check_fit(plan: Plan) -> None:
    """Every layer that the plan took from the headers is a linear layer of the model, of the same shape.

    The plan reads names and shapes of tensors; only the module tree says which of them are linear
    layers inside decoder blocks.

    Raises:
        StageError: when the model has no decoder blocks, or naming the layers that do not fit.
    """
    recipe = plan.recipe
    model = skeleton(plan.source, recipe.model.trust_remote_code)
    actual = {name: shape_of(name, linear) for name, linear in linears(model).items()}
    wanted: dict[str, list[LinearShape]] = {}
    if recipe.sparsify:
        chosen = [x for x in plan.source.linears if selected(x.name, recipe.sparsify.include, recipe.sparsify.exclude)]
        wanted["sparsify.include"] = chosen
    if recipe.quantize:
        chosen = [x for x in plan.source.linears if selected(x.name, recipe.quantize.include, recipe.quantize.exclude)]
        wanted["quantize.include"] = chosen
    if recipe.finetune:
        wanted["finetune.targets"] = [x for x in plan.source.linears if selected(x.name, recipe.finetune.targets, ())]
    modules, model_type = dict(model.named_modules()), type(model).__name__
    wrong = []
    for place, layers in wanted.items():
        for layer in layers:
            if (other := actual.get(layer.name)) == layer:
                continue
            found = type(modules[layer.name]).__name__ if layer.name in modules else "nothing"
            found = f"a linear layer {_size(other)}" if other else found
            wrong.append(f"{place}: {layer.name} {_size(layer)} is {found} in {model_type}")
    if wrong:
        more = [f"… and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
        head = "sqft works on torch.nn.Linear layers inside decoder blocks; exclude what this recipe names besides:"
        raise StageError("\n  ".join([head, *wrong[:SHOWN], *more]))


def _size(layer: LinearShape) -> str:
    return f"[{layer.out_features}, {layer.in_features}]"
