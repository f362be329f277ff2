"""The adapter that was trained, over a base of which one part at a time is in memory, or none."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from sqft.checkpoints.model_spec import ModelSpec
from sqft.components import checks
from sqft.components.kinds import Adapter, Merger
from sqft.modeling.adapters.adapted_linear import AdaptedLinear, attach
from sqft.modeling.adapters.adapted_model import AdaptedModel
from sqft.modeling.architecture.blocks import linears, shape_of
from sqft.modeling.loading.parts import WholeModel
from sqft.recipe.sections import Finetune
from sqft.stages.adapted import is_masked, load_deltas, make_deltas
from sqft.stages.inputs import StageInputs, section_of
from sqft.stages.merge_bases import CodeBases, FloatBases


class AdapterInParts:
    """The adapter that `finetune` trained: small beside its base, so that all of it is in memory.

    Args:
        inputs: a stage's, after `finetune`.
        opened: the base.
        source: the folder that it is read from.
    """

    def __init__(self, inputs: StageInputs, opened: WholeModel, source: ModelSpec) -> None:
        self.inputs, self.opened, self.step = inputs, opened, inputs.plan.step("finetune")
        found, adapter = linears(opened.model), self.step.component(Adapter)
        self.merger, self.label = self.step.component(Merger), self.step.label(Adapter)
        self.linears = {name: found[name] for name in self.step.layers}
        self.bases = self._bases(source)
        self.dropout = checks.check_dropout(self.label, adapter.input_dropout())
        shapes = tuple(shape_of(name, linear) for name, linear in self.linears.items())
        self.space, self.deltas = make_deltas(adapter, self.label, shapes, 0)

    def attach_all(self, tokenizer: PreTrainedTokenizerBase) -> AdaptedModel:
        """Put all layers' adapters, as they were trained, over bases that have no values."""
        learns = self.merger.learns_scales()
        outlines = {name: self.bases.outline(name, learns) for name in self.linears}
        layers = attach(self.opened.model, self.deltas, self.merger, outlines, self.dropout, learns)
        adapted = AdaptedModel(self.opened.model, tokenizer, layers, self.space)
        load_deltas(adapted, self.inputs.folders["finetune"], self.label)
        return adapted

    def attach(self, part: str) -> dict[str, AdaptedLinear]:
        """Put the adapters of a part that is in memory over their bases, and return those layers by name."""
        names = [name for name in self.linears if self.opened.part_of(name) == part]
        deltas = {name: self.deltas[name] for name in names}
        return attach(self.opened.model, deltas, self.merger, self.bases.bases(part, names), self.dropout)

    def detach(self, names: Sequence[str]) -> None:
        """Put the base's own layers back."""
        for name in names:
            self.opened.model.set_submodule(name, self.linears[name])

    def _bases(self, source: ModelSpec) -> FloatBases:
        plan, folders = self.inputs.plan, self.inputs.folders
        base = plan.adapter_base
        floats = base.floats(folders)
        if floats is None:
            return FloatBases(self.opened, self.linears, source, is_masked(base, self.merger))
        start = section_of(self.step, Finetune).base
        return CodeBases(self.opened, self.linears, source, start, plan.spec(floats), base, folders)
