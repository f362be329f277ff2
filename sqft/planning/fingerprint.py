"""What a step's result depends on, as data to take a digest of.

Settings, components and their code, the content of models and data, the inputs' fingerprints and the
seed. Left out is what the result does not depend on: the recipe's name, paths, device, logging.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sqft.data.readers import is_plain_text
from sqft.planning.plan import Step
from sqft.recipe.fields import NoEffect, OutputPath, Section, fields_marked, fields_of, section_in
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import ComponentRef, Evaluate
from sqft.types import InputPath
from sqft.utils.code_digest import digest_files

EVERY_STAGE = (
    "checkpoints/export",
    "checkpoints/gguf",
    "checkpoints/gptq",
    "checkpoints/model_source",
    "checkpoints/model_spec",
    "checkpoints/packed_floats",
    "checkpoints/safetensors",
    "components/kinds",
    "components/options",
    "data/chat_template",
    "data/chat_tokens",
    "data/chats",
    "data/conversations",
    "data/encoding",
    "data/readers",
    "data/records",
    "data/templates",
    "data/tool_calls",
    "data/windows",
    "kernels",
    "modeling/adapters/frozen_weight",
    "modeling/architecture/__init__",
    "modeling/architecture/blocks",
    "modeling/architecture/experts",
    "modeling/architecture/frozen",
    "modeling/architecture/linears",
    "modeling/architecture/names",
    "modeling/compat",
    "modeling/loading/__init__",
    "modeling/loading/folder_reader",
    "modeling/loading/packed_floats",
    "modeling/loading/quantized",
    "modeling/loading/transformers_io",
    "planning/adapter_base",
    "planning/plan",
    "ranks",
    "stages/inputs",
    "types",
)
"""Models, data and what a component may import: `sqft.kernels` as a whole."""

IN_PARTS = (
    "modeling/calibration/capture",
    "modeling/calibration/hidden_states",
    "modeling/loading/part_writer",
    "modeling/loading/parts",
    "modeling/loading/values_of_codes",
    "stages/step_parts",
)

COMPRESS = (
    *IN_PARTS,
    "components/checks",
    "modeling/calibration/block_runs",
    "modeling/calibration/observe",
    "modeling/calibration/statistics",
    "modeling/calibration/team",
    "modeling/calibration/walk",
    "modeling/loading/other_model",
    "stages/compress",
)

ADAPT = (
    "components/checks",
    "modeling/adapters",
    "modeling/loading/parts",
    "modeling/loading/values_of_codes",
    "modeling/loading/without_zeros",
    "stages/adapted",
)

ADAPT_IN_PARTS = ("modeling/loading/part_writer", "stages/adapter_in_parts", "stages/merge_bases")

MEASURE = (
    "data/answers",
    "data/collators",
    "modeling/evaluation/__init__",
    "modeling/evaluation/generation",
    "modeling/evaluation/measures",
    "modeling/training/loss",
    "utils/statistics",
)

TASKS = ("modeling/evaluation/harness", "modeling/evaluation/harness_model")

TRAIN = (
    "modeling/training/checkpoints",
    "modeling/training/teacher",
    "modeling/training/trainer",
    "stages/training_arguments",
)

MERGE = (
    "stages/logits",
    "stages/merge",
    "stages/merge_in_parts",
    "stages/merge_layer",
)

STAGE_CODE: dict[str, tuple[str, ...]] = {
    "sparsify": (*EVERY_STAGE, *COMPRESS, "stages/sparsify"),
    "quantize": (*EVERY_STAGE, *COMPRESS, "stages/quantize"),
    "finetune": (*EVERY_STAGE, *ADAPT, *MEASURE, *TRAIN, "stages/finetune"),
    "search": (*EVERY_STAGE, *ADAPT, *ADAPT_IN_PARTS, *MEASURE, "modeling/evaluation/first_order", "stages/search"),
    "merge": (*EVERY_STAGE, *ADAPT, *ADAPT_IN_PARTS, *IN_PARTS, *MERGE),
    "export": (*EVERY_STAGE, "modeling/loading/finished_model", "stages/export"),
    "evaluate": (*EVERY_STAGE, *ADAPT, *MEASURE, *TASKS, "modeling/evaluation/peft_adapter", "stages/evaluate"),
}
"""The modules and packages of the core that a stage's result depends on: an edit there makes its artifacts anew.

`tests/planning/test_fingerprint.py` holds this against what each stage imports.
"""

WITHOUT_EFFECT = {
    "api": "names of other modules",
    "checkpoints/layout": "what the plan knows of modules; the layers it chooses enter the fingerprint themselves",
    "components/hookspecs": "how plugins are asked for components",
    "components/registration": "digests of components' code, which enter the fingerprint themselves",
    "errors": "exceptions",
    "planning/estimates": "expectations before a run",
    "planning/table": "a plan for people",
    "recipe": "settings, whose values enter the fingerprint themselves",
    "utils/annotations": "where the marks of fields are",
    "utils/code_digest": "digests",
    "utils/digests": "digests",
    "utils/distributed": "how processes find one another; what they compute together is the stages'",
    "utils/files": "how files are written: at once or not at all",
    "utils/progress": "progress bars",
    "utils/resources": "what a result cost, and where freed memory goes",
    "utils/text": "text for people",
}
"""Modules and packages that stages import and that cannot change a result, each with what it holds."""


def fingerprint_of(step: Step, recipe: Recipe, model: str, before: Mapping[str, Step]) -> str:
    """Return a step's fingerprint: SHA-256, hexadecimal, of all that its result depends on.

    Args:
        step: with the digests of its files.
        recipe: its seed (but for a measurement without a searcher) and model section count, and the calibration that
            the step reads.
        model: digest of the recipe's own model.
        before: the steps that it reads, with their fingerprints, by name.
    """
    section = step.section
    # A measurement draws nothing itself: what its inputs drew is in their fingerprints.
    measures_alone = isinstance(section, Evaluate) and not step.components
    renders = bool(step.files)
    if isinstance(section, Evaluate):  # neither a perplexity nor a task without the template renders anything
        renders = bool(section.exact_match or (section.tasks and section.apply_chat_template))
    content: dict[str, Any] = {
        "stage": step.stage,
        "settings": settings_of(step.section),
        "code": core_digest(step.stage),
        "layers": list(step.layers),
        "components": {kind: component.identity for kind, component in step.components.items()},
        "inputs": {role: before[name].fingerprint for role, name in step.inputs.items()},
        "files": dict(step.digests),
        "plain_texts": sorted(role for role, file in step.files.items() if is_plain_text(file)),
        "model": [model, recipe.model.dtype, recipe.model.trust_remote_code, recipe.model.dequantize],
        "chat_template_kwargs": recipe.model.chat_template_kwargs if renders else {},
        "seed": 0 if measures_alone else recipe.seed,
    }
    if "calibration" in step.files and recipe.calibration:
        content["calibration"] = settings_of(recipe.calibration)
    if "finetune" in step.inputs:  # the adapter's and the merger's code runs again
        components = before[step.inputs["finetune"]].components
        content["adapter_code"] = {kind: component.registration.code for kind, component in components.items()}
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def measurement_fingerprints(step: Step, recipe: Recipe, model: str, before: Mapping[str, Step]) -> dict[str, str]:
    """Return the fingerprint that a step would have with one of its measurements alone, for each of `evaluate`.

    They are by the role of a text, "exact_match", and "tasks.NAME". See `fingerprint_of` for the arguments.
    """
    if not isinstance(section := step.section, Evaluate):
        return {}
    alone = {role: (role, Evaluate(of=section.of, perplexity=text)) for role, text in section.texts.items()}
    if section.exact_match:
        alone["exact_match"] = "exact_match.data", Evaluate(of=section.of, exact_match=section.exact_match)
    for name in section.tasks:
        of_task = {"tasks": (name,), "perplexity": None, "exact_match": None}
        alone[f"tasks.{name}"] = "include_path", section.model_copy(update=of_task)
    others = {*section.texts, "exact_match.data", "include_path"}

    def kept(files: Mapping[str, Any], own: str) -> dict[str, Any]:
        named = "perplexity.text" if own in section.texts else own
        rest = {role: file for role, file in files.items() if role not in others}
        return rest | ({named: files[own]} if own in files else {})

    return {
        name: fingerprint_of(
            dataclasses.replace(step, section=one, files=kept(step.files, own), digests=kept(step.digests, own)),
            recipe,
            model,
            before,
        )
        for name, (own, one) in alone.items()
    }


def settings_of(section: Section) -> dict[str, Any]:
    """Return a section without its components (they enter as parts), its paths (as content) and what has no effect."""
    settings = section.model_dump(mode="json", by_alias=True)
    for name, field in fields_of(type(section)).items():
        if section_in(field) is ComponentRef:
            settings.pop(name)
    for marked in list(fields_marked(type(section), (InputPath, OutputPath, NoEffect), settings)):
        marked.holder.pop(marked.key, None)
    return settings


@cache
def core_digest(stage: str) -> str:
    """Return a digest of the core's own code that a stage's result depends on."""
    root = Path(__file__).parents[1]
    return digest_files(sorted(file for name in STAGE_CODE[stage] for file in code_files(root / name)), root)


def code_files(path: Path) -> set[Path]:
    """Return the files of a module, or of all modules of a package, given its path without a suffix."""
    return set(path.rglob("*.py")) if path.is_dir() else {path.with_suffix(".py")}
