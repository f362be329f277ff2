"""One function for each stage: its section of the recipe becomes a step, without a fingerprint as yet.

Mistakes are collected by the resolver, so that a step comes of every section, whatever else is wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

from sqft.components.kinds import Adapter, Allocator, Exporter, Merger, Quantizer, Scorer, Searcher, Updater
from sqft.planning import compatibility, distillation, estimates, evaluation, layout_checks, peft_adapter
from sqft.planning.adapter_base import AdapterBase
from sqft.planning.base_size import Steps, bits_of, component_of, loaded_base, opening_base, stored_base
from sqft.planning.optimizers import check_optimizer
from sqft.planning.plan import ResolvedComponent, Step
from sqft.planning.resolution import Resolver
from sqft.planning.streaming import is_streamed
from sqft.planning.training_memory import estimate_finetune, gradient_bytes
from sqft.recipe.sections import (
    Calibration,
    ComponentRef,
    Evaluate,
    Export,
    Finetune,
    Merge,
    Quantize,
    Search,
    Sparsify,
)
from sqft.recipe.stages import EVALUABLE
from sqft.types import BaseKind, LinearShape, Statistic


def plan_sparsify(section: Sparsify, resolver: Resolver) -> Step:
    """Plan `sparsify`."""
    scorer = resolver.component(Scorer, section.scorer, "sparsify.scorer")
    allocator = resolver.component(Allocator, section.allocator, "sparsify.allocator")
    updater = resolver.component(Updater, section.updater, "sparsify.updater") if section.updater else None
    components = _found(scorer=scorer, allocator=allocator, updater=updater)
    needs = {kind: one.component.needs for kind, one in components.items() if one.component.needs}
    first = next(iter(needs), "scorer")
    label = f"{first} '{components[first].component.name}'" if needs else ""
    # An allocator measures all layers of a block together.
    sequential = updater is not None and Statistic.HESSIAN not in needs.get("allocator", ())
    pruned = resolver.layers(section.include, section.exclude, "sparsify.include")
    calibration, files = _calibration(resolver, needs.get(first, frozenset()), label, pruned, "sparsify.include")
    resolver.collect(compatibility.check_pattern(section, pruned))
    streamed = is_streamed(resolver.model, resolver.dtype, made_by_step=False)
    return Step(
        name="sparsify",
        stage="sparsify",
        section=section,
        layers=_names(pruned),
        streamed=streamed,
        components=components,
        inputs={},
        files={**files, **resolver.files(section, "sparsify")},
        estimate=estimates.estimate_sparsify(
            resolver.model,
            resolver.dtype,
            pruned,
            calibration,
            frozenset().union(*needs.values()),
            sequential,
            streamed,
        ),
    )


def plan_quantize(section: Quantize, resolver: Resolver) -> Step:
    """Plan `quantize`, of the recipe's own model or the sparse one."""
    quantizer = resolver.component(Quantizer, section.quantizer, "quantize.quantizer")
    layers = resolver.layers(section.include, section.exclude, "quantize.include")
    dense = False
    if quantizer:
        resolver.collect(compatibility.check_grid(quantizer, layers, section.exclude))
        dense, problems = compatibility.check_dense(quantizer, resolver.recipe.sparsify)
        resolver.collect(problems)
    resolver.collect(compatibility.check_blocks_alike(resolver.model.layout.linears, layers))
    for notes in (layout_checks.codes_apart, layout_checks.half_joined):
        resolver.note_all(("quantize.include", note) for note in notes(resolver.model.layout, layers))
    needs = quantizer.component.needs if quantizer else frozenset()
    label = f"quantizer '{section.quantizer.name}'"
    calibration, files = _calibration(resolver, needs, label, layers, "quantize.include")
    compensated = quantizer is not None and quantizer.component.gives_compensated and section.keep_compensated
    tuned = resolver.recipe.finetune
    if tuned and tuned.base == "compensated" and not section.keep_compensated:
        resolver.report("quantize.keep_compensated", 'finetune.base "compensated" starts from it; set this to true')
    streamed = is_streamed(resolver.model, resolver.dtype, made_by_step=resolver.recipe.sparsify is not None)
    if dense:  # the model from before pruning is read, too
        streamed = streamed and is_streamed(resolver.model, resolver.dtype, made_by_step=False)
    return Step(
        name="quantize",
        stage="quantize",
        section=section,
        layers=_names(layers),
        streamed=streamed,
        components=_found(quantizer=quantizer),
        inputs={"base": "sparsify"} if resolver.recipe.sparsify else {},
        files={**files, **resolver.files(section, "quantize")},
        estimate=estimates.estimate_quantize(
            resolver.model, resolver.dtype, layers, calibration, needs, bits_of(quantizer), dense, compensated, streamed
        ),
    )


def _calibration(
    resolver: Resolver, needs: frozenset[Statistic], label: str, layers: Sequence[LinearShape], place: str
) -> tuple[Calibration | None, dict[str, Path]]:
    """Return the calibration that a component needs, if it needs any, and its file.

    Args:
        resolver: collects what is wrong.
        needs: what the component needs of it.
        label: names the component.
        layers: those that are compressed.
        place: where the recipe chooses them.
    """
    calibration = resolver.recipe.calibration if needs else None
    if needs:
        layout = resolver.model.layout
        resolver.collect(layout_checks.check_seen(layout, layers, place))
        if layout.walk == "model":
            slower = "runs the whole model, all of it on the device, up to each block, which is slower"
            resolver.note("calibration", f"{slower}: {layout.walk_reason}")
    if calibration:
        resolver.within_window(calibration, "length", "calibration", always=True)
        files = resolver.files(calibration, "calibration")
        return calibration, {"calibration": files.pop("data"), **files}
    if needs:
        resolver.report(
            "calibration",
            f"is missing: {label} needs {', '.join(sorted(needs))}; "
            'add "calibration": {"data": "…", "samples": 128, "length": 2048}',
        )
    return None, {}


def plan_finetune(section: Finetune, resolver: Resolver, base: AdapterBase, steps: Steps) -> Step:
    """Plan `finetune`."""
    adapter = resolver.component(Adapter, section.adapter, "finetune.adapter")
    merger = resolver.component(Merger, section.merger, "finetune.merger")
    came_quantized = resolver.model.quantization is not None
    if merger:
        resolver.collect(compatibility.check_base(merger, base.kind, resolver.installed(Merger)))
    if adapter and merger:
        resolver.collect(compatibility.check_dropout(adapter, merger, base.kind))
    quantizer = component_of(steps["quantize"], Quantizer) if "quantize" in steps else None
    resolver.collect(compatibility.check_start(section, merger, base.kind, came_quantized, quantizer))
    if came_quantized:
        section = section.model_copy(update={"base": "codes"})
    targets, trained = resolver.targets(section.targets, "finetune.targets"), 0
    if adapter and targets:
        trained, problems = compatibility.check_space(adapter, targets)
        resolver.collect(problems)
    if merger:
        resolver.collect(layout_checks.check_peft(resolver.model.layout, targets, merger.component))
    files = resolver.files(section, "finetune")
    section = resolver.within_window(section, "max_length", "finetune")
    resolver.collect(compatibility.check_training(section))
    resolver.collect(check_optimizer(section))
    loaded = loaded_base(resolver, merger, steps, _names(targets))
    teacher = resolver.teacher(section.teacher, "finetune.teacher") if section.teacher else None
    if teacher:
        resolver.collect(distillation.check_teacher(section, teacher))
        for note in distillation.notes(section, resolver, teacher, base.kind):
            resolver.note("finetune.teacher", note)
    streamed = section.base == "packed" and is_streamed(resolver.model, resolver.dtype, base.step is not None)
    if section.base == "packed" and base.kind is BaseKind.DENSE:
        resolver.note("finetune.base", "this recipe does not prune: only layers that came sparse take less memory")
    return Step(
        name="finetune",
        stage="finetune",
        section=section,
        layers=_names(targets),
        components=_found(adapter=adapter, merger=merger),
        inputs=base.inputs,
        files=files,
        streamed=streamed,
        estimate=estimate_finetune(resolver.model, resolver.dtype, section, trained, loaded, teacher, streamed),
    )


def plan_search(section: Search, resolver: Resolver, base: AdapterBase, steps: Steps) -> Step:
    """Plan `search`, after `finetune`."""
    searcher = resolver.component(Searcher, section.searcher, "search.searcher")
    answer = section.answer if section.metric == "exact_match" else None
    resolver.within_window(section, "max_new_tokens", "search")
    finetune = cast(Finetune, steps["finetune"].section)
    needs_records = bool(searcher and searcher.component.needs_records())
    if not needs_records:
        section = section.model_copy(update={"data": None})
    elif section.data is None and not finetune.holdout:
        does = "evaluates" if searcher and searcher.component.evaluates else "computes gradients"
        resolver.report(
            "search.data",
            f"is missing: searcher '{section.searcher.name}' {does} on it; "
            'or keep records of the training data for it: "finetune": {"holdout": 0.1}',
        )
    elif section.data is None:  # records of the training data are evaluated on, and must have answers
        resolver.files(finetune, "finetune", dict.fromkeys(finetune.data_sets, answer))
    merger = component_of(steps["finetune"], Merger)
    loaded = loaded_base(resolver, merger, steps, steps["finetune"].layers)
    deltas, files = steps["finetune"].estimate.storage, resolver.files(section, "search", {"data": answer})
    gradients = searcher is not None and searcher.component.needs_gradients()
    streamed = not needs_records and _adapted_in_parts(resolver, base)
    if not resolver.problems:
        resolver.note_all(evaluation.notes_on_search(section, files, steps, resolver.recipe.model.chat_template_kwargs))
        if section.data:
            resolver.note_all(evaluation.notes_on_known_records("search.data", (files["data"], section.data), steps))
    return Step(
        name="search",
        stage="search",
        section=section,
        components=_found(searcher=searcher),
        inputs={"finetune": "finetune", **base.inputs},
        files=files,
        streamed=streamed,
        estimate=estimates.estimate_search(
            resolver.model,
            resolver.dtype,
            deltas,
            loaded,
            base.quantized,
            opening_base(resolver, merger, steps, loaded),
            bool(searcher and searcher.component.evaluates),
            streamed,
            gradient_bytes(resolver.model, resolver.dtype, finetune) if gradients else 0,
        ),
    )


def _adapted_in_parts(resolver: Resolver, base: AdapterBase) -> bool:
    """Return whether the base of an adapter is read one decoder block at a time, where it is not trained."""
    # Under codes that a step made are floats which that step read in the same way.
    made_by_step = (base.floats_step if base.quantized else base.step) is not None
    streamed = is_streamed(resolver.model, resolver.dtype, made_by_step)
    # Experts in codes are stored one by one, and read as a whole.
    return streamed and (not base.quantized or (base.step is not None and not resolver.model.layout.experts))


def plan_merge(section: Merge, resolver: Resolver, base: AdapterBase, steps: Steps) -> Step | None:
    """Plan `merge`, after `finetune` and `search`; None when there is nothing to merge."""
    merger = component_of(steps["finetune"], Merger)
    if merger and not merger.component.merges:
        resolver.collect(compatibility.check_merge(merger, resolver.installed(Merger)))
        return None
    sizes = stored_base(resolver, steps), loaded_base(resolver, merger, steps, steps["finetune"].layers)
    tuned = steps["finetune"].layers, steps["finetune"].estimate.storage
    streamed = _adapted_in_parts(resolver, base)
    return Step(
        name="merge",
        stage="merge",
        section=section,
        streamed=streamed,
        components={},
        inputs={"search": "search", "finetune": "finetune", **base.inputs},
        files=resolver.files(section, "merge"),
        estimate=estimates.estimate_merge(resolver.model, resolver.dtype, *tuned, *sizes, base.quantized, streamed),
    )


def plan_export(sections: Sequence[Export], resolver: Resolver, base: AdapterBase, steps: Steps) -> Iterator[Step]:
    """Plan each `export`: of the merged model, or of the last model that a step makes."""
    recipe = resolver.recipe
    if sections and recipe.finetune and recipe.merge is None:
        resolver.report("export", 'exports a complete model, but the adapter is not merged; add "merge": {}')
        return
    inputs = {"merge": "merge"} if recipe.finetune else {"base": base.step} if base.step else {}
    if sections and not inputs and base.kind is not None and not base.quantized:
        resolver.report("export", "has nothing to export; add sparsify, or finetune and merge")
        return
    for index, section in enumerate(sections):
        place = f"export.{index}"
        exporter = resolver.component(Exporter, section.exporter, f"{place}.exporter")
        if exporter:
            others = resolver.installed(Exporter)
            resolver.collect(compatibility.check_exporter(exporter, base.kind, others, f"{place}.exporter"))
            _check_codes(resolver, exporter.component, base, f"{place}.exporter")
            if resolver.has_model:
                quantizer = component_of(steps["quantize"], Quantizer) if "quantize" in steps else None
                given = resolver.model, quantizer, base.quantized
                resolver.collect(compatibility.check_export(exporter, *given, f"{place}.exporter"))
        yield Step(
            name="export" if len(sections) == 1 else f"export:{section.exporter.name}-{index}",
            stage="export",
            section=section,
            components=_found(exporter=exporter),
            inputs=inputs,
            files=resolver.files(section, place),
            estimate=estimates.estimate_export(resolver.model, resolver.dtype),
        )


def _check_codes(resolver: Resolver, exporter: Exporter, base: AdapterBase, place: str) -> None:
    """Say what becomes of codes that are stored layer by layer: those of `quantize`, or of the recipe's own model."""
    if not (base.quantized and exporter.needs_codes):
        return
    layout, section = resolver.model.layout, resolver.recipe.quantize
    layers: Sequence[LinearShape] = layout.linears
    if section:
        layers = resolver.layers(section.include, section.exclude, "quantize.include")
    else:  # otherwise said of quantize
        resolver.note_all((place, note) for note in layout_checks.codes_apart(layout, layers))
    resolver.collect(layout_checks.check_codes_apart(layout, layers, exporter, place))


def plan_evaluate(section: Evaluate, resolver: Resolver, base: AdapterBase, steps: Steps) -> Iterator[Step]:
    """Plan `evaluate`: a step for each entry of `of`."""
    if not (section.perplexity or section.exact_match or section.tasks):
        resolver.report("evaluate", "measures nothing; add perplexity, exact_match or tasks")
    answers = {"exact_match.data": section.exact_match.answer} if section.exact_match else {}
    files = resolver.files(section, "evaluate", answers)
    resolver.collect(evaluation.check_tasks(section, files.get("include_path")))
    resolver.collect(evaluation.check_template(section, resolver.conversations))
    if not resolver.problems:
        resolver.note_all(evaluation.notes_on_chats(section, files, steps, resolver.recipe.model.chat_template_kwargs))
        resolver.note_all(evaluation.notes_on_seen_text(section, files, steps, resolver.recipe.calibration))
        if section.exact_match and evaluation.measures_tuned(section):
            asked = files["exact_match.data"], section.exact_match.data
            resolver.note_all(evaluation.notes_on_known_records("evaluate.exact_match.data", asked, steps))
    of_adapter, values = peft_adapter.find_adapter(section, resolver)
    files |= of_adapter
    section = evaluation.texts_within_window(section, files, resolver)
    if section.exact_match:
        resolver.within_window(section.exact_match, "max_new_tokens", "evaluate.exact_match")
    planned = set()
    for index, name in enumerate(section.of):
        subject = _subject(name, f"evaluate.of.{index}", resolver, base, steps)
        if subject is None:
            continue
        if name in planned:
            resolver.report(f"evaluate.of.{index}", f"'{name}' is listed twice")
            continue
        planned.add(name)
        inputs, components = subject
        yield Step(
            name=f"evaluate:{name}",
            stage="evaluate",
            section=section.model_copy(update={"of": (name,)}),
            components=components,
            inputs=inputs,
            files=files,
            estimate=estimates.estimate_evaluate(resolver.model, resolver.dtype, values),
        )


Subject = tuple[dict[str, str], dict[str, ResolvedComponent[Any]]]


def _subject(name: str, place: str, resolver: Resolver, base: AdapterBase, steps: Steps) -> Subject | None:
    """Return the inputs and components of one entry of `evaluate.of`; None when it is a mistake, here or elsewhere.

    Args:
        name: the entry.
        place: where it is in the recipe.
        resolver: collects the mistake.
        base: what lies under the adapters.
        steps: those planned so far.
    """
    stage, _, searcher_name = name.partition(":")
    if name == "model":
        return {}, {}
    if name in ("sparsify", "quantize") and name in steps:
        return {"base": name}, {}
    if name == "search" and name in steps:
        return {"search": "search", "finetune": "finetune", **base.inputs}, {}
    if name == "merge" and resolver.recipe.merge is not None:
        return ({"merge": "merge"}, {}) if "merge" in steps else None
    if stage == "finetune" and searcher_name and "finetune" in steps:
        ref = ComponentRef.model_construct(name=searcher_name, options={})
        searcher = resolver.component(Searcher, ref, place)
        if searcher and searcher.component.needs_records():
            resolver.report(
                place, f"searcher '{searcher_name}' needs evaluations; name one that does not (heuristic, …)"
            )
            return None
        return ({"finetune": "finetune", **base.inputs}, {"searcher": searcher}) if searcher else None
    if name in EVALUABLE or (stage == "finetune" and searcher_name):
        resolver.report(place, f"'{name}' is not made by this recipe; add its section or remove it here")
    else:
        resolver.report(place, f"'{name}' is not one of {', '.join(EVALUABLE)}")
    return None


def _names(layers: Iterable[LinearShape]) -> tuple[str, ...]:
    return tuple(layer.name for layer in layers)


def _found(**components: ResolvedComponent[Any] | None) -> dict[str, ResolvedComponent[Any]]:
    """Return the components that were found, by kind."""
    return {kind: component for kind, component in components.items() if component is not None}
