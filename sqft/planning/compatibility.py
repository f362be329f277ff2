"""Whether the choices of a recipe fit one another and the model's layers. No torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from sqft.components.kinds import Adapter, Exporter, Merger, Quantizer
from sqft.planning.plan import ResolvedComponent
from sqft.planning.resolution import Resolver
from sqft.recipe.sections import Finetune, Sparsify
from sqft.types import BaseKind, LinearShape
from sqft.utils.patterns import selected


def dropout_option(adapter: Adapter) -> str:
    """Return the path of the option that turned dropout on: the one that, at its default, turns it off."""
    for name in sorted(adapter.model_fields_set):
        default = type(adapter).model_fields[name].get_default(call_default_factory=True)
        if not adapter.model_copy(update={name: default}).input_dropout():
            return f"finetune.adapter.options.{name}"
    return "finetune.adapter"


class Fitting(Resolver):
    """What does not fit becomes a problem with its path in the recipe; nothing is raised."""

    def _base_fits(self, merger: ResolvedComponent[Any] | None) -> None:
        if merger is None or not isinstance(merger.component, Merger):
            return
        recipe = self.recipe
        if self.source is None and not recipe.quantize:  # what the base is was not to be found out
            return
        kind = BaseKind.QUANTIZED if self._on_codes() else BaseKind.SPARSE if recipe.sparsify else BaseKind.DENSE
        if kind in merger.component.bases:
            return
        fitting = self._mergers(lambda other: kind in other.bases)
        works = " or ".join(sorted(merger.component.bases))
        self._problem(
            "finetune.merger",
            f"'{merger.component.name}' works on a {works} base, but this recipe's is {kind}; "
            f"use {' or '.join(fitting) or 'another merger'}, or change what comes before",
        )

    def _no_dropout(self, adapter: ResolvedComponent[Any] | None, merger: ResolvedComponent[Any] | None) -> None:
        """A weight rounded on a grid is no sum of a base and a delta, so the delta's input has no path of its own."""
        if not (adapter and merger and self._on_codes()):
            return
        component, merging = adapter.component, merger.component
        if not isinstance(component, Adapter) or not isinstance(merging, Merger):
            return
        if component.input_dropout() and merging.merges:
            self._problem(
                dropout_option(component),
                f"'{merging.name}' rounds the merged weight, so the adapter has no input of its own; set it to 0",
            )

    def _on_codes(self) -> bool:
        """Whether codes lie under the adapters."""
        return bool(self.recipe.quantize or (self.source and self.source.quantization))

    def _start(self, section: Finetune, merger: ResolvedComponent[Any] | None) -> Finetune:
        """The section with a place to start from that there is."""
        if section.base == "codes" and self.source and not self._on_codes():
            self._problem(
                "finetune.base", "there are no codes: this recipe does not quantize; add quantize, or remove this"
            )
        if section.mask == "codes" and self.source and not self.source.quantization:
            self._problem("finetune.mask", "only a model that came as codes needs a mask of them; remove this")
        elif (
            section.mask == "codes" and merger and isinstance(merger.component, Merger) and not merger.component.merges
        ):
            self._problem(
                "finetune.mask",
                f"'{merger.component.name}' leaves the codes as they are and masks nothing; remove this",
            )
        if self.source and self.source.quantization and section.base == "floats":
            if "base" in section.model_fields_set:
                self._problem("finetune.base", 'the model has no floats, only codes; remove this, or say "codes"')
            return section.model_copy(update={"base": "codes"})
        return section

    def _training_fits(self, section: Finetune) -> None:
        if section.steps and section.warmup_steps >= section.steps:
            self._problem("finetune.warmup_steps", f"{section.warmup_steps} of {section.steps} steps; warm up in fewer")
        if section.warmup_steps and section.warmup_ratio:
            self._problem("finetune.warmup_ratio", "warmup_steps says it too; remove one of them")
        if section.schedule == "polynomial" and section.learning_rate <= 1e-7:
            self._problem("finetune.learning_rate", "a polynomial schedule ends at 1e-7; start above it")
        for name in ("patience", "evaluate_every"):
            if name in section.model_fields_set and getattr(section, name) and section.validation is None:
                self._problem(f"finetune.{name}", 'there is nothing to evaluate on; add "validation": "….jsonl"')
        for index, name in enumerate(section.report_to):
            if find_spec(name) is None and not (name == "tensorboard" and find_spec("tensorboardX")):
                self._problem(
                    f"finetune.report_to.{index}", f"'{name}' is not installed; pip install {name}, or remove it here"
                )

    def _exporter_fits(self, part: ResolvedComponent[Any] | None, place: str) -> None:
        if part is None or not isinstance(part.component, Exporter):
            return
        if part.component.needs_codes and self.source and not self._on_codes():
            components = [registration.component for registration in self.registry.entries()]
            fitting = sorted(c.name for c in components if issubclass(c, Exporter) and not c.needs_codes)
            self._problem(
                place,
                f"'{part.component.name}' writes codes, but this recipe's model holds floats; "
                f"use {' or '.join(fitting) or 'another exporter'}, or add quantize",
            )

    def _mergers(self, fits: Callable[[type[Merger]], bool]) -> list[str]:
        components = [registration.component for registration in self.registry.entries()]
        return sorted(c.name for c in components if issubclass(c, Merger) and fits(c))

    def _grid_fits(self, part: ResolvedComponent[Any], quantizer: Quantizer, chosen: list[LinearShape]) -> None:
        try:
            reasons = [(layer, said) for layer in chosen if (said := quantizer.incompatibility(layer))]
        except (Exception, SystemExit) as error:  # a plugin's code
            self._problem("quantize.quantizer", f"{part.registration} raised {error!r}")
            return
        if reasons:
            layer, said = reasons[0]
            self._problem("quantize.quantizer", f"{layer.name}: {said} ({len(reasons)} such layers; or exclude them)")

    def _n_m(self, section: Sparsify, pruned: list[LinearShape]) -> None:
        if ":" not in section.pattern:
            return
        if section.allocator != Sparsify.model_fields["allocator"].default:
            self._problem(
                "sparsify.allocator", f"has no say: '{section.pattern}' is one sparsity everywhere; remove it"
            )
        block = int(section.pattern.partition(":")[2])
        odd = [linear for linear in pruned if linear.in_features % block]
        if odd:
            self._problem(
                "sparsify.pattern",
                f"'{section.pattern}' needs layers whose inputs are a multiple of {block}; {odd[0].name} has "
                f"{odd[0].in_features} ({len(odd)} such layers): exclude them or choose another pattern",
            )

    def _targets(self, section: Finetune) -> tuple[LinearShape, ...]:
        if self.source is None:
            return ()
        chosen = tuple(linear for linear in self.source.linears if selected(linear.name, section.targets, ()))
        for index, target in enumerate(section.targets):
            if not any(selected(linear.name, [target], ()) for linear in chosen):
                self._problem(
                    f"finetune.targets.{index}",
                    f"'{target}' matches no linear layer; the model has {self._last_names()}",
                )
        return chosen
