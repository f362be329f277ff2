"""Resolve a recipe against what is installed: steps, or every mistake at once.

No torch: everything that can be checked without loading a model is checked here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sqft.components.checks import check_space
from sqft.components.kinds import Adapter, Allocator, Merger, Quantizer, Scorer, Searcher
from sqft.components.registry import Registry
from sqft.errors import Problem, RecipeError, SqftError
from sqft.planning.adapter_base import AdapterBase
from sqft.planning.compatibility import Fitting
from sqft.planning.estimates import Estimate, activation_bytes, calibration_bytes
from sqft.planning.fingerprint import fingerprint_of
from sqft.planning.plan import Plan, ResolvedComponent, Step
from sqft.recipe.fields import Section
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import Calibration, ComponentRef, Evaluate, Search
from sqft.types import BaseKind, Statistic
from sqft.utils.digests import Digests


def make_plan(recipe: Recipe, registry: Registry, digests: Digests) -> Plan:
    """Resolve a recipe against what is installed.

    Raises:
        RecipeError: with every mistake at once, each with its path in the file.
    """
    planner = _Planner(recipe, registry, digests)
    plan = planner.plan()
    if planner.problems:
        broken = [Problem("", line.strip()) for line in planner.broken]
        raise RecipeError([*planner.problems, *broken], recipe.source)
    assert plan is not None
    return plan


class _Planner(Fitting):
    """Walks the recipe's sections in the paper's order and makes steps of them."""

    def __init__(self, recipe: Recipe, registry: Registry, digests: Digests) -> None:
        super().__init__(recipe, registry, digests)
        self.steps: dict[str, Step] = {}
        self.base: dict[str, str] = {}  # role and step of the base under the adapters, where the recipe makes one

    def plan(self) -> Plan | None:
        recipe = self.recipe
        self._model()
        for name in ("sparsify", "quantize") if self.source and self.source.quantization else ():
            if getattr(recipe, name) is not None:
                self._problem(
                    name, "the model is already quantized; remove this section, or name the float model it was made of"
                )
        self.base = {"base": self._sparsify()} if recipe.sparsify else {}
        if recipe.quantize:
            self.base = {"base": self._quantize(), **({"floats": "sparsify"} if self.base else {})}
        if recipe.finetune:
            merger = self._finetune()
            self._search()
            if recipe.merge is not None:
                self._merge(merger)
        else:
            self._without_finetune()
        self._export()
        if recipe.evaluate:
            self._evaluate(recipe.evaluate)
        if not (self.steps or self.problems):
            self._problem("", "asks for nothing; add a section such as sparsify, finetune or evaluate")
        return Plan(recipe, self.source, self._adapter_base(), tuple(self.steps.values())) if self.source else None

    def _adapter_base(self) -> AdapterBase:
        assert self.source is not None
        kind = BaseKind.QUANTIZED if self._on_codes() else BaseKind.SPARSE if self.recipe.sparsify else BaseKind.DENSE
        return AdapterBase(kind, self.source.path, self.base.get("base"), self.base.get("floats"))

    # -- sections, in the paper's order ---------------------------------------------------------

    def _sparsify(self) -> str:
        section = self.recipe.sparsify
        assert section is not None
        scorer = self._part("scorer", section.scorer, "sparsify.scorer")
        allocator = self._part("allocator", section.allocator, "sparsify.allocator")
        needs = scorer.component.needs if scorer and isinstance(scorer.component, Scorer) else frozenset()
        more = allocator.component.needs if allocator and isinstance(allocator.component, Allocator) else frozenset()
        calibration, files = self._calibration(needs, f"scorer '{section.scorer.name}'")
        if not calibration:
            calibration, files = self._calibration(more, f"allocator '{section.allocator.name}'")
        pruned = self._chosen(section.include, section.exclude, "sparsify.include")
        self._n_m(section, pruned)
        weights, size = self._weights()
        walk = calibration_bytes(self.source, calibration, needs | more, pruned) if self.source else 0
        mask = sum(linear.out_features * linear.in_features for linear in pruned) // 8
        return self._add(
            "sparsify",
            section,
            {"scorer": scorer, "allocator": allocator},
            {},
            files,
            Estimate(weights, size + mask, size + max(size, walk) + (1 << 29)),
            {"calibration": calibration and calibration.model_dump(exclude={"data"})},
        )

    def _quantize(self) -> str:
        section = self.recipe.quantize
        assert section is not None
        part = self._part("quantizer", section.quantizer, "quantize.quantizer")
        chosen = self._chosen(section.include, section.exclude, "quantize.include")
        quantizer = part.component if part and isinstance(part.component, Quantizer) else None
        if part and quantizer:
            self._grid_fits(part, quantizer, chosen)
        taken: dict[str, set[bool]] = {}  # blocks may hold other layers than their neighbours
        for layer in self.source.linears if self.source else ():
            inner = re.split(r"\.\d+\.", layer.name, maxsplit=1)[-1]
            taken.setdefault(inner, set()).add(layer in chosen)
        if any(len(found) > 1 for found in taken.values()):
            self._problem("quantize.include", "differs from block to block, which no checkpoint format can say")
        needs = quantizer.needs if quantizer else frozenset()
        calibration, files = self._calibration(needs, f"quantizer '{section.quantizer.name}'")
        weights, size = self._weights()
        walk = calibration_bytes(self.source, calibration, needs, chosen, sequential=True) if self.source else 0
        codes = sum(layer.out_features * layer.in_features for layer in chosen)  # a byte each until they are stored
        return self._add(
            "quantize",
            section,
            {"quantizer": part},
            self.base,
            files,
            Estimate(
                weights,
                self._in_codes(chosen, getattr(quantizer, "bits", None)),
                size + max(size, walk) + 2 * codes + (1 << 29),
            ),
            {"calibration": calibration and calibration.model_dump(exclude={"data"})},
        )

    def _calibration(self, needs: frozenset[Statistic], label: str) -> tuple[Calibration | None, dict[str, Path]]:
        """The calibration a component needs, if it needs any, and its file."""
        calibration = self.recipe.calibration if needs else None
        if calibration:
            self._within_window(calibration, "length", "calibration", always=True)
            return calibration, {"calibration": self._file(calibration.data, "calibration.data")}
        if needs:
            self._problem(
                "calibration",
                f"is missing: {label} needs {', '.join(sorted(needs))}; "
                'add "calibration": {"data": "…", "samples": 128, "length": 2048}',
            )
        return None, {}

    def _finetune(self) -> ResolvedComponent[Any] | None:
        section = self.recipe.finetune
        assert section is not None
        adapter = self._part("adapter", section.adapter, "finetune.adapter")
        merger = self._part("merger", section.merger, "finetune.merger")
        self._base_fits(merger)
        self._no_dropout(adapter, merger)
        section = self._start(section, merger)
        targets = self._targets(section)
        trained = 0
        if adapter and targets:
            assert isinstance(adapter.component, Adapter)
            try:
                space = adapter.component.space(targets)
                check_space(str(adapter.registration), targets, space)
                top = {member: max(group.ranks) for group in space.groups for member in group.members}
                trained = sum(top.get(t.name, 0) * (t.in_features + t.out_features) for t in targets)
            except (
                Exception,
                SystemExit,
            ) as error:  # a plugin's code
                said = str(error) if isinstance(error, SqftError) else f"{adapter.registration} raised {error!r}"
                self._problem("finetune.adapter", said)
        files = self._training_data(section)
        section = self._within_window(section, "max_length", "finetune")
        if section.validation:
            files["validation"] = self._records(section.validation, "finetune.validation")
        self._training_fits(section)
        activations = activation_bytes(self.source, section) if self.source else 0
        memory = self._held(merger) + 16 * trained + activations + (1 << 29)
        self._add(
            "finetune",
            section,
            {"adapter": adapter, "merger": merger},
            self.base,
            files,
            Estimate(trained, 4 * trained, memory),
        )
        return merger

    def _search(self) -> None:
        section = self.recipe.search or Search.model_validate({})
        searcher = self._part("searcher", section.searcher, "search.searcher")
        files = {}
        answer = section.answer if section.metric == "exact_match" else None
        self._within_window(section, "max_new_tokens", "search")
        if searcher and isinstance(searcher.component, Searcher) and searcher.component.evaluates:
            if section.data is None and self.recipe.finetune and not self.recipe.finetune.holdout:
                self._problem(
                    "search.data",
                    f"is missing: searcher '{section.searcher.name}' evaluates on it; "
                    'or keep records of the training data for it: "finetune": {"holdout": 0.1}',
                )
            elif section.data is None and self.recipe.finetune:
                self._training_data(self.recipe.finetune, answer)
            elif section.data is not None:
                files = {"data": self._records(section.data, "search.data", answer)}
        elif section.data is not None:
            section = section.model_copy(update={"data": None})
        _, size = self._weights()
        merger = self.steps["finetune"].components.get("merger") if "finetune" in self.steps else None
        memory = self._held(merger) + (2 if self._on_codes() else 1) * size + (1 << 29)
        trained = self.steps["finetune"].estimate.storage if "finetune" in self.steps else 0
        self._add(
            "search",
            section,
            {"searcher": searcher},
            {"finetune": "finetune", **self.base},
            files,
            Estimate(0, trained, memory + trained),
            self._tuning_code(),
        )

    def _merge(self, merger: ResolvedComponent[Any] | None) -> None:
        section = self.recipe.merge
        assert section is not None
        if merger and isinstance(merger.component, Merger) and not merger.component.merges:
            names = self._mergers(lambda other: other.merges)
            self._problem(
                "merge",
                f"merger '{merger.component.name}' leaves the adapter beside the base, so there is nothing to merge; "
                f'remove "merge", or set finetune.merger to one that merges: {", ".join(names) or "none installed"}',
            )
            return
        weights, size = self._weights()
        inputs = {"search": "search", "finetune": "finetune", **self.base}
        # The tuned, effective, base and merged weights, and codes of the last three.
        memory = self._held(merger) + 3 * size + (3 * weights if self._on_codes() else 0) + (1 << 29)
        self._add("merge", section, {}, inputs, {}, Estimate(weights, self._stored(), memory), self._tuning_code())

    def _export(self) -> None:
        if not self.recipe.export:
            return
        if self.recipe.finetune and self.recipe.merge is None:
            self._problem("export", 'exports a whole model, and the adapter is not merged; add "merge": {}')
            return
        role = {"merge": "merge"} if self.recipe.finetune else {r: step for r, step in self.base.items() if r == "base"}
        if not role and not (self.source and self.source.quantization):  # a GPTQ checkpoint can be exported as it is
            if self.source:
                self._problem("export", "has nothing to export; add sparsify, or finetune and merge")
            return
        weights, size = self._weights()
        for index, section in enumerate(self.recipe.export):
            part = self._part("exporter", section.exporter, f"export.{index}.exporter")
            self._exporter_fits(part, f"export.{index}.exporter")
            name = "export" if len(self.recipe.export) == 1 else f"export:{section.exporter.name}-{index}"
            self._add(
                "export", section, {"exporter": part}, role, {}, Estimate(weights, size, size + (1 << 29)), name=name
            )

    def _evaluate(self, section: Evaluate) -> None:
        if not (section.perplexity or section.exact_match or section.tasks):
            self._problem("evaluate", "measures nothing; add perplexity, exact_match or tasks")
        files = {}
        if section.perplexity:
            files["perplexity"] = self._file(section.perplexity.text, "evaluate.perplexity.text")
            shorter = self._within_window(section.perplexity, "length", "evaluate.perplexity")
            section = section.model_copy(update={"perplexity": shorter})
        if section.exact_match:
            self._within_window(section.exact_match, "max_new_tokens", "evaluate.exact_match")
            files["exact_match"] = self._records(
                section.exact_match.data, "evaluate.exact_match.data", section.exact_match.answer
            )
        if section.include_path:
            files["include_path"] = self._file(section.include_path, "evaluate.include_path", folder=True)
        weights, size = self._weights()
        for index, what in enumerate(section.of):
            place = f"evaluate.of.{index}"
            inputs, parts = self._subject(what, place)
            if inputs is None:
                continue
            if f"evaluate:{what}" in self.steps:
                self._problem(place, f"'{what}' is listed twice")
                continue
            # `of` is no part of a row's fingerprint, so that asking for one more re-does no other.
            self._add(
                "evaluate",
                section.model_copy(update={"of": (what,)}),
                parts,
                inputs,
                files,
                Estimate(weights, 1 << 16, 2 * size + (1 << 30)),
                self._tuning_code() if "finetune" in inputs else {},
                name=f"evaluate:{what}",
            )

    def _subject(self, what: str, place: str) -> tuple[dict[str, str] | None, dict[str, ResolvedComponent[Any] | None]]:
        """The inputs and parts of one entry of `evaluate.of`."""
        stage, _, name = what.partition(":")
        if what == "model":
            return {}, {}
        if what in ("sparsify", "quantize") and what in self.steps:
            return {"base": what}, {}
        if what == "search" and "search" in self.steps:
            return {"search": "search", "finetune": "finetune", **self.base}, {}
        if what == "merge" and self.recipe.merge is not None:
            return ({"merge": "merge"} if "merge" in self.steps else None), {}
        if stage == "finetune" and name and "finetune" in self.steps:
            part = self._part("searcher", ComponentRef.model_construct(name=name, options={}), place)
            if part and isinstance(part.component, Searcher) and part.component.evaluates:
                self._problem(place, f"searcher '{name}' needs evaluations; name one that does not (heuristic, …)")
                part = None
            return ({"finetune": "finetune", **self.base} if part else None), {"searcher": part}
        known = ["model", "sparsify", "quantize", "finetune:NAME", "search", "merge"]
        if what in known or (stage == "finetune" and name):
            self._problem(place, f"'{what}' is not made by this recipe; add its section or remove it here")
        else:
            self._problem(place, f"'{what}' is none of {', '.join(known)}")
        return None, {}

    def _without_finetune(self) -> None:
        for name in ("search", "merge"):
            if getattr(self.recipe, name) is not None:
                self._problem(name, "needs a finetune section; add one or remove this")

    # -- pieces ---------------------------------------------------------------------------------

    def _tuning_code(self) -> dict[str, Any]:
        """Later stages run the adapter's and the merger's code again: an edit re-does them too."""
        step = self.steps.get("finetune")
        return {"tuning": {kind: part.registration.code for kind, part in step.components.items()}} if step else {}

    def _stored(self) -> int:
        """Bytes on disk of the model under the adapters."""
        if self.source and self.source.quantization:
            return self._in_codes(self.source.linears, self.source.quantization["bits"])
        return self.steps["quantize"].estimate.storage if "quantize" in self.steps else self._weights()[1]

    def _held(self, merger: ResolvedComponent[Any] | None) -> int:
        """Bytes in memory of the model under the adapters: codes stay packed, unless floats are put on their grid."""
        merges = merger is not None and isinstance(merger.component, Merger) and merger.component.merges
        floats = self.recipe.quantize and self.recipe.finetune and self.recipe.finetune.base == "floats"
        return self._weights()[1] if merges and floats else self._stored()

    def _add(
        self,
        stage: str,
        section: Section,
        parts: Mapping[str, ResolvedComponent[Any] | None],
        inputs: Mapping[str, str],
        files: Mapping[str, Path],
        estimate: Estimate,
        more: Mapping[str, Any] | None = None,
        name: str | None = None,
    ) -> str:
        whole = {kind: part for kind, part in parts.items() if part is not None}
        name = name or stage
        fingerprint, digests = "", {}
        if not self.problems:  # no fingerprint can be had of a recipe with mistakes, and none is needed
            assert self.source is not None
            digests = {role: self.digests.path(path) for role, path in files.items()}
            fingerprint = fingerprint_of(
                stage,
                section,
                parts={kind: part.identity for kind, part in whole.items()},
                inputs={role: self.steps[step].fingerprint for role, step in inputs.items()},
                files=digests,
                model=[self.source.digest, self.recipe.model.dtype, self.recipe.model.trust_remote_code],
                seed=self.recipe.seed,
                more=more,
            )
        self.steps[name] = Step(name, stage, section, whole, dict(inputs), fingerprint, estimate, dict(files), digests)
        return name
