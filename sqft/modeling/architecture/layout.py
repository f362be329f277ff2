"""What a plan needs to know of a model, found in its modules: no weight is read."""

from __future__ import annotations

from sqft.checkpoints.layout import LeftOut, ModelLayout
from sqft.checkpoints.model_spec import ModelSpec
from sqft.modeling.architecture.blocks import decoder_blocks, linears, shape_of
from sqft.modeling.architecture.experts import Expert
from sqft.modeling.architecture.linears import unsplittable_mixtures
from sqft.modeling.architecture.names import CheckpointNames
from sqft.modeling.calibration.dry_run import how_to_walk, uncalled
from sqft.modeling.loading import load_skeleton


def describe(spec: ModelSpec) -> ModelLayout:
    """Return what a model's modules say of its layers, on the meta device.

    Raises:
        ModelError: when transformers cannot make a model of its config, or it has no decoder blocks.
    """
    model = load_skeleton(spec)
    layers, names, walk = linears(model), CheckpointNames(model), how_to_walk(model)
    experts = tuple(name for name, module in model.named_modules() if isinstance(module, Expert))
    return ModelLayout(
        architecture=type(model).__name__,
        linears=tuple(shape_of(name, layer) for name, layer in layers.items()),
        blocks=tuple(decoder_blocks(model)),
        experts=experts,
        left_out=tuple(
            LeftOut(name, weights, "a mixture of experts that cannot be split")
            for name, weights in unsplittable_mixtures(model).items()
        ),
        walk=walk.way,
        walk_reason=walk.reason,
        unseen=walk.unseen,
        uncalled=tuple(uncalled(model, [name for name in layers if name.rpartition(".")[0] not in experts])),
        checkpoint_names={n: names.layers[n] for n in layers if names.layers.get(n, n) != n},
        unnamed={n: why for n, why in names.unnamed.items() if n in layers},
    )
