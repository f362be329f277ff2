"""A result that leaves the store: its model card, its recipe and its report, and the way to the Hugging Face hub."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from sqft.errors import SqftError
from sqft.execution.report import table
from sqft.recipe.fields import OutputPath, fields_marked
from sqft.recipe.recipe import Recipe
from sqft.tools.run_report.facts import RunFacts
from sqft.tools.run_report.page import render
from sqft.types import InputPath
from sqft.utils.files import write_text
from sqft.utils.text import escaped, human_size

CARD, RECIPE, REPORT = "README.md", "sqft-recipe.json", "sqft-report.html"
"""Files beside a result. Not "recipe.json": a folder with that is a run's."""
MADE_BY = {"sparsify": "sparse", "quantize": "quantized", "finetune": "fine-tuned", "merge": "adapters merged"}
FORMATS = {
    "gptq": "a GPTQ checkpoint",
    "compressed-tensors": "a compressed-tensors checkpoint",
    "gguf": "a GGUF file",
    "adapter": "a PEFT adapter",
    "floats": "safetensors, floats",
}
TRIED = {
    "gptq": "transformers with gptqmodel and optimum, and auto-gptq",
    "compressed-tensors": "transformers with compressed-tensors",
    "gguf": "llama.cpp (by xllamacpp) and transformers",
    "adapter": "peft",
    "floats": "transformers",
}
"""With which programs sqft's tests open folders of a format. See docs/how-to/export.md."""


def documents(run: RunFacts, name: str) -> dict[str, str]:
    """Return the texts that stand beside a result, by file name: card, recipe, and with matplotlib report.

    Args:
        run: the run that made it. No path of this machine gets into the texts: of each, the last part is left.
        name: what the result is loaded by: a folder, or an id on the hub.
    """
    result = _result(run)
    recipe = without_local_paths(run.recipe)
    record = {**run.record, "loading": run.loading.replace(str(result), name)}
    public = dataclasses.replace(run, recipe=recipe, record=record)
    texts = {
        CARD: card(public, name, _license(run.recipe)),
        RECIPE: json.dumps(recipe, indent=2, ensure_ascii=False) + "\n",
    }
    try:
        texts[REPORT] = render([public])
    except SqftError:
        pass  # without matplotlib, the card has the table
    return texts


def write_documents(run: RunFacts, folder: Path) -> None:
    """Write card, recipe and report of a run into a copy of its result."""
    for file, text in documents(run, folder.name).items():
        write_text(folder / file, text)


def card(run: RunFacts, name: str, license: str | None = None) -> str:
    """Return the model card: the hub's metadata, what was done, results, how to load it. `license` is the base's."""
    from huggingface_hub import ModelCard, ModelCardData

    base = base_model(run.recipe)
    steps = [words for step, words in MADE_BY.items() if step in _made(run)]
    data = ModelCardData(
        model_name=PurePath(name).name,
        base_model=base,
        datasets=sorted(_hub_data(run.recipe)) or None,
        license=license,
        library_name="gguf" if format_of(run) == "gguf" else "peft" if format_of(run) == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["sqft", *(MADE_BY[step] for step in ("sparsify", "quantize", "finetune") if step in _made(run))],
        eval_results=list(_eval_results(run)) or None,
    )
    heads, cells = table({"rows": run.report["rows"]})
    lines = [
        f"# {PurePath(name).name}",
        f"Made from {base or PurePath(str(run.recipe['model']['path'])).name} by sqft "
        f"{run.record['versions']['sqft']}: {', '.join(steps)}. {_precision(run)} It is {FORMATS[format_of(run)]}.",
        "## Load it",
        f"```text\n{run.loading}\n```",
        f"sqft's tests open such folders with {TRIED[format_of(run)]}.",
        "Zeros by themselves make no program faster here: these are dense files.",
    ]
    if cells:
        lines += ["## Results", "\n".join([_line(heads), "|---" * len(heads) + "|", *map(_line, cells)])]
        lines.append("Each row is a step, measured before any export. ± is a standard error over the items.")
    lines += ["## Recipe", f"`{RECIPE}` (of paths, only the last part is left):"]
    lines.append(f"```json\n{json.dumps(run.recipe, indent=2, ensure_ascii=False)}\n```")
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"))


def push(run: RunFacts, repo: str, public: bool = False) -> str:
    """Upload a run's result with its card, recipe and report, in one commit, and return the address.

    Args:
        run: the run.
        repo: the repository's id, "owner/name". It is made if it does not exist.
        public: whether a repository that is made is public.

    Raises:
        SqftError: when the run has no result that another machine could load, or the hub refuses it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    result = _result(run)
    if format_of(run) == "adapter" or (result / "sqft_adapter.json").is_file():
        raise SqftError(
            f"the result of run {run.name} is an adapter, and its base is only in this store; merge it "
            f"(`sqft merge {run.name}`), or push the base and the adapter yourself"
        )
    files = sorted(path for path in result.rglob("*") if path.is_file())
    added = [CommitOperationAdd(path.relative_to(result).as_posix(), path) for path in files]
    added += [CommitOperationAdd(name, text.encode()) for name, text in documents(run, repo).items()]
    api = HfApi()
    # OSError, and the error of the HTTP library that huggingface_hub uses: no connection, a timeout.
    network: Any = HfHubHTTPError.__bases__
    refusals: tuple[type[Exception], ...] = (*network, HFValidationError, OfflineModeIsEnabled, ValueError)
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        names = {operation.path_in_repo: operation for operation in added}  # a document wins over a file of its name
        api.create_commit(made.repo_id, list(names.values()), commit_message=f"sqft run {run.name}")
    except refusals as error:
        reason = str(error).strip().splitlines()[0]
        raise SqftError(f"{repo} could not be uploaded: {reason}; `hf auth login` logs in, or set HF_TOKEN") from None
    return str(made)


def without_local_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored recipe in which the last part alone is left of each path on this machine."""
    raw: dict[str, Any] = copy.deepcopy(dict(recipe))
    for field in fields_marked(Recipe, (InputPath, OutputPath), raw):
        if isinstance(field.value, str) and PurePath(field.value).is_absolute():
            field.holder[field.key] = PurePath(field.value).name
    return raw


def base_model(recipe: Mapping[str, Any]) -> str | None:
    """Return the Hugging Face id of a stored recipe's own model; None for a folder or a file."""
    path = str(recipe["model"]["path"])
    return path if "/" in path and not PurePath(path).is_absolute() else None


def format_of(run: RunFacts) -> str:
    """Return the format of a run's result: a key of `FORMATS`."""
    result = _result(run)
    if next(result.glob("*.gguf"), None):
        return "gguf"
    if not (result / "config.json").is_file():
        return "adapter"
    settings = json.loads((result / "config.json").read_text("utf-8")).get("quantization_config") or {}
    return str(settings.get("quant_method", "floats")) if settings.get("quant_method") in FORMATS else "floats"


def _result(run: RunFacts) -> Path:
    if run.result is None:
        raise SqftError(f"run {run.name} has no result in the store; run its recipe again, up to search or merge")
    return run.result


def _final_row(run: RunFacts) -> Mapping[str, Any] | None:
    """Return the measurements of the last model that the run made; None when it was not measured."""
    made = [name for name in _made(run) if name in ("sparsify", "quantize", "search", "merge")]
    rows = {row["configuration"].partition(" ")[0]: row for row in run.report["rows"]}
    return rows.get(made[-1]) if made else None


def _made(run: RunFacts) -> list[str]:
    """Return the steps up to the one that wrote the result."""
    names, folder = list(run.record["artifacts"]), _result(run).parent.name
    writers = [index for index, link in enumerate(run.record["artifacts"].values()) if PurePath(link).name == folder]
    return names[: max(writers) + 1]


def _eval_results(run: RunFacts) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    row = _final_row(run)
    if row is None:
        return

    def result(data: str, metric: str, value: float) -> EvalResult:
        return EvalResult("text-generation", data, data, metric, round(value, 5))

    if row["accuracy"] is not None:
        match = run.recipe["evaluate"]["exact_match"]["data"]
        yield result(PurePath(match["path"] if isinstance(match, dict) else match).name, "accuracy", row["accuracy"])
    for text, found in row.get("texts", {}).items():
        yield result(PurePath(text).name, "perplexity", found["perplexity"])
    for task, metrics in row["tasks"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                yield result(task, metric.partition(",")[0], value)


def _precision(run: RunFacts) -> str:
    """Return what share of the weights is zero, in how many bits they are, and how large the result is."""
    made = [name for name in _made(run) if name in ("sparsify", "quantize", "merge")]
    reports = [run.artifacts[name].report for name in made if name in run.artifacts]
    sparsity = next((report["sparsity"] for report in reversed(reports) if "sparsity" in report), None)
    bits = next((report["bits"] for report in reversed(reports) if "bits" in report), None)
    zeros = f"{sparsity:.2%} of the weights of its linear layers are zero. " if sparsity is not None else ""
    size = human_size(sum(path.stat().st_size for path in _result(run).rglob("*") if path.is_file()))
    return f"{zeros}{f'Linear layers have {bits} bits a weight. ' if bits else ''}Size: {size}."


def _hub_data(recipe: Mapping[str, Any]) -> set[str]:
    """Return the ids of data sets on the hub that a stored recipe names."""
    marked = fields_marked(Recipe, InputPath, copy.deepcopy(dict(recipe)))
    named = [field.value for field in marked if field.marker.hub and field.place[0] != "model" and field.value]
    return {value for value in named if isinstance(value, str) and "/" in value and not PurePath(value).is_absolute()}


def _license(recipe: Mapping[str, Any]) -> str | None:
    """Return the licence that the card in the base model's own folder names."""
    from huggingface_hub.repocard import metadata_load

    file = Path(str(recipe["model"]["path"])) / CARD
    try:
        named = (metadata_load(file) or {}).get("license") if file.is_file() else None
    except (OSError, ValueError):
        return None
    return named if isinstance(named, str) else None


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(map(escaped, cells))} |"
