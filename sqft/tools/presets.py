"""Recipes to start from: the paper's pipelines, with an explanation of each choice."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sqft.components.registry import Registry
from sqft.errors import SqftError
from sqft.recipe.fields import fields_marked, fields_of, section_in
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import ComponentRef
from sqft.types import InputPath
from sqft.utils.hub import HUB_ID

MODEL, DATA = "HuggingFaceTB/SmolLM2-360M", "data"
GENERAL_TEXT = {"path": "allenai/c4", "file": "en/c4-train.00000-of-01024.json.gz", "limit": 2000}
"""What to calibrate on when the user has no text for it: of the web, cleaned. The papers on pruning and GPTQ calibrate
on this file (Raffel et al. 2020, section 2.2). 0.3 GB are downloaded, once."""
SPARSIFY = {"scorer": "wanda", "sparsity": 0.5, "pattern": "row"}
QUANTIZE = {"quantizer": {"name": "gptq", "options": {"bits": 4, "group_size": 64}}}
LORA = {"name": "lora", "options": {"rank": 32, "alpha": 64}}
NLS = {"name": "nls", "options": {"ranks": [32, 24, 16], "alpha": 64}}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TRAINING = {"epochs": 3, "batch_size": 16, "learning_rate": 3e-4, "max_length": 512}


@dataclass(frozen=True)
class Pipeline:
    """A summary of a pipeline, and the sections of its recipe. Paths are relative to the folder of data."""

    summary: str
    sections: Mapping[str, Any]


def _tuned(adapter: Mapping[str, Any], merger: str, **more: str) -> dict[str, Any]:
    data = {"data": "train.jsonl"}
    return {"finetune": {"adapter": adapter, "merger": merger, **more, "targets": TARGETS, **data, **TRAINING}}


def _answers(*of: str) -> dict[str, Any]:
    return {"evaluate": {"of": list(of), "exact_match": {"data": "test.jsonl", "max_new_tokens": 16}}}


def _text(*of: str) -> dict[str, Any]:
    return {"evaluate": {"of": list(of), "perplexity": {"text": "heldout.txt", "length": 1024}}}


SPARSE: dict[str, Any] = {"sparsify": SPARSIFY}
CODES: dict[str, Any] = {"sparsify": SPARSIFY, "quantize": QUANTIZE}
ON_CODES = ("sparsify", "quantize", "search", "merge")
PIPELINES = {
    "sparsify": Pipeline(
        "Only sparsify: half of the weights set to zero, nothing trained.", SPARSE | _text("model", "sparsify")
    ),
    "quantize": Pipeline(
        "Only quantize: INT4 codes in a GPTQ checkpoint, nothing trained.",
        {"quantize": QUANTIZE} | _text("model", "quantize"),
    ),
    "gptq": Pipeline(
        "Sparsify, then quantize so that every zero stays zero; nothing trained.",
        SPARSE
        | {"quantize": {"quantizer": {"name": "gptq", "options": {"bits": 4, "group_size": 64, "symmetric": False}}}}
        | _text("model", "sparsify", "quantize"),
    ),
    "lora": Pipeline(
        "LoRA on a sparse model. The adapter stays beside the model, because merging it would fill the zeros again.",
        SPARSE | _tuned(LORA, "unmerged") | _answers("sparsify", "search"),
    ),
    "shears": Pipeline(
        "Shears: elastic adapters on a sparse model, cut to the chosen ranks. The adapter stays beside the model.",
        SPARSE | _tuned(NLS, "unmerged") | _answers("sparsify", "search"),
    ),
    "sparsepeft": Pipeline(
        "SparsePEFT: elastic adapters trained through the mask, so that they merge and every zero stays zero.",
        SPARSE | _tuned(NLS, "sparsepeft") | {"merge": {}} | _answers("sparsify", "search", "merge"),
    ),
    "gptq-lora": Pipeline(
        "LoRA on a sparse INT4 model. The adapter stays beside the model, in floats.",
        CODES | _tuned(LORA, "unmerged") | _answers("sparsify", "quantize", "search"),
    ),
    "sqft": Pipeline(
        "SQFT: elastic adapters on a sparse INT4 model. The adapter stays beside the model, in floats.",
        CODES | _tuned(NLS, "unmerged") | _answers("sparsify", "quantize", "search"),
    ),
    "qa-sparsepeft": Pipeline(
        "QA-SparsePEFT: elastic adapters trained through the mask and the grid, merged into one sparse INT4 model.",
        CODES | _tuned(NLS, "qa-sparsepeft") | {"merge": {}} | _answers(*ON_CODES),
    ),
    "qa-sparsepeft-low-memory": Pipeline(
        "QA-SparsePEFT from the codes alone: training needs less memory and starts at the quantized model.",
        CODES | _tuned(NLS, "qa-sparsepeft", base="codes") | {"merge": {}} | _answers(*ON_CODES),
    ),
    "qa-sparsepeft-compensated": Pipeline(
        "QA-SparsePEFT from what the quantizer rounded: it starts at the quantized model, and small deltas move codes.",
        CODES | _tuned(NLS, "qa-sparsepeft", base="compensated") | {"merge": {}} | _answers(*ON_CODES),
    ),
}


def starting_recipe(name: str, output: Path, model: str = MODEL, data: str = DATA) -> dict[str, Any]:
    """Return a pipeline's recipe, to be written to the file `output`; its relative paths start at that file's folder.

    `data` is a folder with train.jsonl, test.jsonl and heldout.txt, as far as the recipe needs them. Or it is one file
    of records to train on, with the other files next to it. A calibration.jsonl there is used; where there is none,
    general text is downloaded, because what calibrates on the task's own text loses on other text.

    Raises:
        SqftError: when there is no pipeline of this name.
    """
    if name not in PIPELINES:
        raise SqftError(f"there is no pipeline '{name}'; pipelines: {', '.join(PIPELINES)}")
    place = Path(data).expanduser()
    records = place if place.is_file() or (place.suffix and not place.is_dir()) else None
    folder = place.parent if records else place
    names = {"train.jsonl": records.name} if records else {}

    own = (folder / "calibration.jsonl").is_file()
    calibration = {"data": "calibration.jsonl" if own else GENERAL_TEXT, "samples": 64, "length": 1024}
    sections = copy.deepcopy({"calibration": calibration, **PIPELINES[name].sections})
    for field in fields_marked(Recipe, InputPath, sections):
        if not (field.marker.hub and HUB_ID.fullmatch(field.value)):
            field.holder[field.key] = _from(output, folder / names.get(field.value, field.value))
    local = Path(model).expanduser()
    path = model if HUB_ID.fullmatch(model) and not local.exists() else _from(output, local)
    return {"schema": 1, "name": name, "seed": 0, "model": {"path": path, "dtype": "bfloat16"}, **sections}


def _from(output: Path, path: Path) -> str:
    """Return a path as the recipe in the file `output` must name it. An absolute path does not change."""
    return str(path) if path.is_absolute() else os.path.relpath(path, output.parent)


def as_text(value: Any, indent: int = 0) -> str:
    """Return JSON as people write it: an object that fits on one line is on one line."""
    line = json.dumps(value)
    if not isinstance(value, dict) or (indent and indent + len(line) <= 100):
        return line
    inner = (f"{' ' * (indent + 2)}{json.dumps(key)}: {as_text(held, indent + 2)}" for key, held in value.items())
    return "{\n" + ",\n".join(inner) + "\n" + " " * indent + "}"


def explanation(name: str, raw: Mapping[str, Any], registry: Registry) -> str:
    """Return an explanation of every choice in a recipe, as Markdown, from the descriptions of its fields."""
    return "\n".join([f"# {name}", "", PIPELINES[name].summary, *_explained(Recipe, raw, registry, "")]) + "\n"


def _explained(model: type[BaseModel], raw: Mapping[str, Any], registry: Registry, indent: str) -> Iterator[str]:
    fields = fields_of(model)
    for key, value in raw.items():
        field = fields[key]
        inner = section_in(field)
        if not indent and inner:  # a section
            yield from ("", f"## {key}", "", (inspect.getdoc(inner) or "").partition("\n\n")[0].replace("\n", " "), "")
            yield from _explained(inner, value, registry, "  ")
        elif inner is ComponentRef:
            yield from _component(key, ComponentRef.model_validate(_named(value)), field.description or "", registry)
        elif isinstance(value, dict) and inner:
            yield f"- `{key}`: {field.description}"
            yield from (f"  {line}" for line in _explained(inner, value, registry, "  "))
        elif indent:
            yield f"- `{key}` = `{json.dumps(value)}`: {field.description}"


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


def _component(kind: str, ref: ComponentRef, description: str, registry: Registry) -> Iterator[str]:
    component = registry.get(kind, ref.name).component
    summary = (inspect.getdoc(component) or "").partition("\n")[0]
    yield f"- `{kind}` = `{ref.name}`: {description}. {summary}"
    for option, value in ref.options.items():
        about = component.model_fields[option].description
        yield f"  - `{option}` = `{json.dumps(value)}`" + (f": {about}" if about else "")
