"""Recipes to start from: the paper's pipelines, and what we measured to be better. Each choice is explained."""

from __future__ import annotations

import copy
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sqft.components.kinds import Searcher
from sqft.components.registry import Registry
from sqft.data.hub import is_data_set_id
from sqft.errors import SqftError
from sqft.recipe.fields import fields_marked, fields_of, section_in
from sqft.recipe.recipe import Recipe
from sqft.recipe.rerun import paths
from sqft.recipe.sections import ComponentRef
from sqft.types import InputPath
from sqft.utils.hub import HUB_ID

MODEL, DATA, VALIDATION = "HuggingFaceTB/SmolLM2-360M", "data", "validation.jsonl"
GENERAL_TEXT = {"path": "allenai/c4", "file": "en/c4-train.00000-of-01024.json.gz", "limit": 2000}
"""What to calibrate on when the user has no text for it: of the web, cleaned. The papers on pruning and GPTQ calibrate
on this file (Raffel et al. 2020, section 2.2). 0.3 GB are downloaded, once."""
SPARSIFY = {"scorer": "wanda", "sparsity": 0.5, "pattern": "row"}
GPTQ = {"bits": 4, "group_size": 64}
REFINE = {"refine": 3, "refine_damp": 0.5, "target": "dense"}
"""Better codes of a sparse model than GPTQ's alone: docs/results/gptq.md."""
MADE_UP: dict[str, Any] = SPARSIFY | {"updater": "least-squares"}
"""Kept weights make up for pruned ones: docs/results/scorers.md."""
LORA = {"name": "lora", "options": {"rank": 32, "alpha": 64}}
NLS = {"name": "nls", "options": {"ranks": [32, 24, 16], "alpha": 64}}
TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
TRAINING = {"epochs": 3, "batch_size": 16, "learning_rate": 3e-4, "max_length": 512}
HIRA_RATE = 1.2e-3
"""Its update is a fraction of each weight. It was best at four times the learning rate at which SparsePEFT was best:
docs/results/adapters.md."""


@dataclass(frozen=True)
class Pipeline:
    """A summary of a pipeline, and the sections of its recipe. Paths are relative to the folder of data."""

    summary: str
    sections: Mapping[str, Any]


def _tuned(adapter: Mapping[str, Any], merger: str, **more: Any) -> dict[str, Any]:
    how = {"targets": TARGETS, "data": "train.jsonl", **TRAINING}
    return {"finetune": {"adapter": adapter, "merger": merger, **how, **more}}


def _answers(*of: str) -> dict[str, Any]:
    return {"evaluate": {"of": list(of), "exact_match": {"data": "test.jsonl", "max_new_tokens": 16}}}


def _text(*of: str) -> dict[str, Any]:
    return {"evaluate": {"of": list(of), "perplexity": {"text": "heldout.txt", "length": 1024}}}


SPARSE: dict[str, Any] = {"sparsify": SPARSIFY}
ON_CODES = ("sparsify", "quantize", "search", "merge")


def _quantize(**options: Any) -> dict[str, Any]:
    return {"quantize": {"quantizer": {"name": "gptq", "options": {**GPTQ, **options}}}}


def _only_quantize(**options: Any) -> dict[str, Any]:
    """Nothing is trained from what was rounded, so it need not be kept."""
    return {"quantize": {**_quantize(**options)["quantize"], "keep_compensated": False}}


def _pipelines(refine: Mapping[str, Any]) -> dict[str, Pipeline]:
    """Return the pipelines by name; `refine` are options of gptq where codes of a sparse model are used as they are."""
    codes = SPARSE | _quantize(**refine)
    return {
        "sparsify": Pipeline(
            "Only sparsify: half of the weights set to zero, nothing trained.", SPARSE | _text("model", "sparsify")
        ),
        "quantize": Pipeline(
            "Only quantize: INT4 codes in a GPTQ checkpoint, nothing trained.",
            _only_quantize() | _text("model", "quantize"),
        ),
        "gptq": Pipeline(
            "Sparsify, then quantize so that every zero stays zero; nothing trained.",
            SPARSE | _only_quantize(symmetric=False, **refine) | _text("model", "sparsify", "quantize"),
        ),
        "lora": Pipeline(
            "LoRA on a sparse model. The adapter stays beside the model, because merging it would fill the zeros.",
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
        "hira": Pipeline(
            "HiRA on a sparse model whose kept weights make up for the pruned ones; merges as SparsePEFT does. Not the "
            "paper's: the best that we measured of those that stay in floats.",
            {"sparsify": MADE_UP}
            | _tuned(NLS, "hira", learning_rate=HIRA_RATE)
            | {"merge": {}}
            | _answers("sparsify", "search", "merge"),
        ),
        "hira-int4": Pipeline(
            "The same, trained through a grid and merged into one sparse INT4 model. Not the paper's: the best that we "
            "measured of those in INT4.",
            {"sparsify": MADE_UP}
            | _quantize()
            | _tuned(NLS, "hira", learning_rate=HIRA_RATE)
            | {"merge": {}}
            | _answers(*ON_CODES),
        ),
        "gptq-lora": Pipeline(
            "LoRA on a sparse INT4 model. The adapter stays beside the model, in floats.",
            codes | _tuned(LORA, "unmerged") | _answers("sparsify", "quantize", "search"),
        ),
        "sqft": Pipeline(
            "SQFT: elastic adapters on a sparse INT4 model. The adapter stays beside the model, in floats.",
            codes | _tuned(NLS, "unmerged") | _answers("sparsify", "quantize", "search"),
        ),
        "qa-sparsepeft": Pipeline(
            "QA-SparsePEFT: elastic adapters trained through the mask and the grid, merged into one sparse INT4 model.",
            # It starts from the floats that were quantized: of the codes' choices, only the grids matter.
            SPARSE | _quantize() | _tuned(NLS, "qa-sparsepeft") | {"merge": {}} | _answers(*ON_CODES),
        ),
        "qa-sparsepeft-low-memory": Pipeline(
            "QA-SparsePEFT from the codes alone: less memory in training, but small deltas move no code.",
            codes | _tuned(NLS, "qa-sparsepeft", base="codes") | {"merge": {}} | _answers(*ON_CODES),
        ),
    }


@dataclass(frozen=True)
class Choices:
    """What a user adds to a pipeline.

    Args:
        searcher: chooses the ranks; None leaves them to the default of `search`.
        baseline: whether the model is measured too, as it is before anything is done to it.
        answer: which part of a generated text is compared; None leaves it to the default of `exact_match`.
    """

    searcher: Searcher | None = None
    baseline: bool = False
    answer: str | None = None

    def add_to(self, name: str, sections: dict[str, Any], folder: Path) -> None:
        """Add them to the sections of a pipeline, whose paths are relative to the folder of data.

        Raises:
            SqftError: when it has no place for them.
        """
        evaluate = sections["evaluate"]
        if self.baseline and "model" not in evaluate["of"]:
            evaluate["of"].insert(0, "model")
        if self.answer and "exact_match" not in evaluate:
            raise SqftError(f"pipeline '{name}' measures perplexity, and compares no answers; leave --answer out")
        if self.answer:
            evaluate["exact_match"]["answer"] = self.answer
        if not self.searcher:
            return
        if not _is_elastic(sections):
            elastic = (other for other, pipeline in PIPELINES.items() if _is_elastic(pipeline.sections))
            raise SqftError(f"pipeline '{name}' has no ranks to search; these have some: {', '.join(elastic)}")
        sections["search"] = {"searcher": self.searcher.name}
        if self.searcher.needs_records():  # by the measure of the finished model
            sections["search"] |= {key: value for key, value in evaluate["exact_match"].items() if key != "data"}
            if (folder / VALIDATION).is_file():
                sections["search"]["data"] = VALIDATION
            else:
                sections["finetune"]["holdout"] = 0.1


def _is_elastic(sections: Mapping[str, Any]) -> bool:
    return bool(sections.get("finetune", {}).get("adapter") == NLS)


PIPELINES = _pipelines(REFINE)
PAPER = _pipelines({})
"""The same with the paper's own choices."""


def starting_recipe(
    name: str,
    output: Path,
    model: str = MODEL,
    data: str = DATA,
    paper: bool = False,
    choices: Choices = Choices(),
) -> dict[str, Any]:
    """Return a pipeline's recipe.

    Args:
        name: of the pipeline.
        output: the file that the recipe is to be written to; its relative paths start at that file's folder.
        model: a folder, a GGUF file or a Hugging Face id.
        data: a folder with train.jsonl, test.jsonl and heldout.txt, as far as the recipe needs them. Or one file of
            records to train on, with the other files next to it. A calibration.jsonl there is used; where there is
            none, general text is downloaded, because what calibrates on the task's own text loses on other text. A
            search evaluates on a validation.jsonl there, or on a tenth of the records to train on.
        paper: whether its choices are the paper's own, where we measured others to be better.
        choices: what is added to the pipeline.

    Raises:
        SqftError: when there is no pipeline of this name, or it has no place for the choices.
    """
    if name not in PIPELINES:
        hint = "".join(f". Did you mean '{close}'?" for close in get_close_matches(name, PIPELINES, 1))
        raise SqftError(f"there is no pipeline '{name}'; pipelines: {', '.join(PIPELINES)}{hint}")
    place = Path(data).expanduser()
    records = place if place.is_file() or (place.suffix and not place.is_dir()) else None
    folder = place.parent if records else place
    names = {"train.jsonl": records.name} if records else {}

    own = (folder / "calibration.jsonl").is_file()
    calibration = {"data": "calibration.jsonl" if own else GENERAL_TEXT, "samples": 64, "length": 1024}
    sections = copy.deepcopy({"calibration": calibration, **(PAPER if paper else PIPELINES)[name].sections})
    choices.add_to(name, sections, folder)
    for field in fields_marked(Recipe, InputPath, sections):
        if not is_data_set_id(field.value):
            field.holder[field.key] = _from(output, folder / names.get(field.value, field.value))
    local = Path(model).expanduser()
    path = model if HUB_ID.fullmatch(model) and not local.exists() else _from(output, local)
    head = {"schema": 1, "name": name, "seed": 0, "model": {"path": path, "dtype": "bfloat16"}}
    return head | {key: sections[key] for key in fields_of(Recipe) if key in sections}


def _from(output: Path, path: Path) -> str:
    """Return a path as the recipe in the file `output` must name it. An absolute path does not change."""
    return str(path) if path.is_absolute() else os.path.relpath(path, output.parent)


def missing_files(recipe: Recipe) -> list[Path]:
    """Return the files and folders of data that a recipe names and that do not exist; the hub's data sets are none."""
    named = (path for path in paths(recipe).values() if not is_data_set_id(path))
    return [file for file in dict.fromkeys(map(recipe.resolve, named)) if not file.exists()]


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
