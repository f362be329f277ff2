"""A result that leaves the store: its model card, its recipe and its report, and the way to the Hugging Face hub."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any, cast

from sqft.errors import SqftError
from sqft.execution.report import table
from sqft.recipe.fields import OutputPath, fields_marked
from sqft.recipe.recipe import Recipe
from sqft.store.artifacts import Artifact, Store
from sqft.tools.run_report.facts import RunFacts
from sqft.tools.run_report.page import render
from sqft.types import InputPath
from sqft.utils.files import reason, write_text
from sqft.utils.hub import HUB_ID
from sqft.utils.peft_config import CONFIG, read_config
from sqft.utils.text import human_size, markdown_rows

CARD, RECIPE, REPORT = "README.md", "sqft-recipe.json", "sqft-report.html"
"""Files beside a result. Not "recipe.json": a folder with that is a run's."""
MADE_BY = {"sparsify": "sparse", "finetune": "fine-tuned", "merge": "adapters merged"}
"""What a step makes of a model, in a word; "quantized" is said of any result with codes."""


@dataclass(frozen=True)
class Format:
    """A format of results: what it is, the library that the hub names, and with what sqft's tests open it."""

    words: str
    library: str | None
    tried: str = ""


FORMATS = {
    "gptq": Format("a GPTQ checkpoint", "transformers", "transformers with gptqmodel, and ONNX Runtime GenAI"),
    "compressed-tensors": Format(
        "a compressed-tensors checkpoint", "transformers", "transformers with compressed-tensors"
    ),
    "gguf": Format("a GGUF file", "gguf", "llama.cpp (by xllamacpp) and transformers"),
    "peft": Format("a PEFT adapter on the model that `adapter_config.json` names", "peft", "peft"),
    "sqft": Format("an adapter that acts through its merger; merge it to get a model", None),
    "floats": Format("safetensors, floats", "transformers", "transformers"),
    "other": Format("what a plugin's exporter wrote", None),
}


def documents(run: RunFacts, name: str) -> dict[str, str]:
    """Return the texts that stand beside a result, by file name: card, recipe, and with matplotlib report.

    No path of this machine gets into them: of each, the last part is left.

    Args:
        run: the run that made it.
        name: what the result is loaded by: a folder, or an id on the hub.

    Raises:
        SqftError: when the run has no result, or its record does not say how it is loaded.
    """
    if "loading" not in run.record:
        raise SqftError(
            f"the record of run {run.name} does not say what its result is; run its recipe again (it is reused)"
        )
    format, public = format_of(run), _public(run, name)
    texts = {CARD: card(public, name, format, _license(run.recipe))}
    texts[RECIPE] = json.dumps(public.recipe, indent=2, ensure_ascii=False) + "\n"
    if find_spec("matplotlib"):  # without it, the card has the table
        texts[REPORT] = render([public])
    return texts


def _public(run: RunFacts, name: str) -> RunFacts:
    """Return what may be said of a run elsewhere: without paths of this machine."""
    hub_file = "/" in name and format_of(run) == "gguf"
    loading = f"llama-cli -hf {name}" if hub_file else run.loading(name)
    base, commit = hub_base(run), _commit_of_base(run)
    named = f'"{base}"' + (f', revision="{commit}"' if commit else "")
    loading = re.sub(r'"(/[^"]*)"', lambda found: named if base else f'"{PurePath(found[1]).name}"', loading)
    rows = [{**row, "texts": _short_names(row.get("texts", {}))} for row in run.report["rows"]]
    return dataclasses.replace(
        run,
        report={**run.report, "rows": rows},
        recipe=without_local_paths(run.recipe),
        record={**run.record, "loading": loading},
    )


def _short_names(texts: Mapping[str, Any]) -> dict[str, Any]:
    """Return texts by the names of their files alone, with a number where one comes again."""
    named: dict[str, Any] = {}
    for path, measured in texts.items():
        times = sum(PurePath(other).name == PurePath(path).name for other in [*texts][: [*texts].index(path)])
        named[PurePath(path).name + (f" ({times + 1})" if times else "")] = measured
    return named


def write_documents(run: RunFacts, folder: Path) -> None:
    """Write card, recipe and report of a run into a copy of its result."""
    for file, text in documents(run, folder.name).items():
        write_text(folder / file, text)


def card(run: RunFacts, name: str, format: str, license: str | None = None) -> str:
    """Return the model card: the hub's metadata, what was done, results, how to load it.

    Args:
        run: what may be said of the run.
        name: what the result is loaded by.
        format: of the result, a key of `FORMATS`.
        license: the base model's.
    """
    from huggingface_hub import ModelCard, ModelCardData

    base, what, bits = base_model(run.recipe), FORMATS[format], _bits(run)
    steps = [words for step, words in MADE_BY.items() if step in _made(run)]
    data = ModelCardData(
        model_name=PurePath(name).name,
        base_model=base,
        datasets=sorted(_hub_data(run.recipe)) or None,
        license=license,
        library_name=what.library,
        pipeline_tag="text-generation",
        tags=["sqft", *(word for word in steps if word != MADE_BY["merge"]), *(["quantized"] if bits else [])],
        eval_results=list(_eval_results(run)) or None,
    )
    heads, cells = table({"rows": run.report["rows"]})
    sparsity = _sparsity(run)
    facts = [
        f"Made from {base or PurePath(str(run.recipe['model']['path'])).name} by sqft "
        f"{run.record['versions']['sqft']}: {', '.join(steps) or 'exported'}.",
        f"{sparsity:.2%} of the weights of its linear layers are zero." if sparsity else "",
        f"Linear layers have {bits} bits a weight." if bits else "",
        f"It is {what.words}: {human_size(sum(path.stat().st_size for path in _files(run).values()))}.",
    ]
    lines = [f"# {PurePath(name).name}", " ".join(filter(None, facts)), "## Load it", f"```text\n{run.loading()}\n```"]
    lines += [f"sqft's tests open such results with {what.tried}."] if what.tried else []
    lines += ["The zeros by themselves make no program faster: they are stored like other weights."] if sparsity else []
    if cells:
        lines += ["## Results", markdown_rows(heads, cells)]
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
        SqftError: when the run has no result that another machine could load, such as an adapter on a model that is
            only in this store; or when the hub refuses it.
        ArtifactError: when a file of the result has changed since it was stored.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    format, base = format_of(run), hub_base(run)
    if format == "sqft" or (format == "peft" and base is None):
        how = f"Merge it (`sqft merge {run.name}`)" if format == "sqft" else "Train it with a merger that merges"
        raise SqftError(
            f"the result of run {run.name} is an adapter that nobody else could load: only a LoRA beside a model of "
            f"the hub, which the recipe neither prunes, quantizes nor dequantizes, is pushed alone. {how}, or push the "
            "base and the adapter yourself"
        )
    Store(run.root).verify(_artifact(run))
    api = HfApi()
    try:
        made = api.create_repo(repo, private=not public, exist_ok=True)
        texts = documents(run, made.repo_id)  # these win over files of their names
        texts |= {CONFIG: _config_naming(run, base)} if format == "peft" and base else {}
        contents = _files(run) | {name: text.encode() for name, text in texts.items()}
        operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
        api.create_commit(made.repo_id, operations, commit_message=f"sqft run {run.name}")
    except SqftError:
        raise
    except Exception as error:  # of the hub, of its HTTP library, of the disk: none of them is a fault of sqft
        raise SqftError(
            f"{repo} could not be uploaded: {reason(error)}; `hf auth login` logs in, or set HF_TOKEN"
        ) from error
    return str(made)


def _config_naming(run: RunFacts, base: str) -> str:
    """Return an adapter's configuration with a base on the hub in place of that folder in this machine's cache."""
    config = read_config(_result(run), run.name) | {"base_model_name_or_path": base, "revision": _commit_of_base(run)}
    return json.dumps(config, indent=2) + "\n"


def _commit_of_base(run: RunFacts) -> str | None:
    """Return the revision of the base of a run's adapter, if it is one: the commit, as a branch may move on."""
    result = _result(run)
    base = read_config(result, run.name).get("base_model_name_or_path") if (result / CONFIG).is_file() else None
    folder = PurePath(str(base))  # in the hub's cache, a commit's folder has its name
    if folder.parent.name == "snapshots":
        return folder.name
    revision: str | None = run.recipe["model"].get("revision")
    return revision


def without_local_paths(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored recipe in which the last part alone is left of each path on this machine."""
    raw: dict[str, Any] = copy.deepcopy(dict(recipe))
    for field in fields_marked(Recipe, (InputPath, OutputPath), raw):
        field.holder[field.key] = _last_part(field.value)
    return cast(dict[str, Any], _with_short_options(raw))


def _with_short_options(content: Any, inside: bool = False) -> Any:
    """Return plain data in which options' paths are shortened: those of plugins that are not installed, too."""
    if isinstance(content, dict):
        return {key: _with_short_options(value, inside or key == "options") for key, value in content.items()}
    if isinstance(content, list):
        return [_with_short_options(value, inside) for value in content]
    return _last_part(content) if inside else content


def _last_part(value: Any) -> Any:
    return PurePath(value).name if isinstance(value, str) and PurePath(value).is_absolute() else value


def base_model(recipe: Mapping[str, Any]) -> str | None:
    """Return the Hugging Face id of a stored recipe's own model; None for a folder or a file."""
    path = str(recipe["model"]["path"])
    return path if HUB_ID.fullmatch(path) else None


def hub_base(run: RunFacts) -> str | None:
    """Return the Hugging Face id of the model that a run's adapters act on; None when that is only in the store, or is
    there in another form than on the hub."""
    changed = any(run.recipe.get(step) is not None for step in ("sparsify", "quantize"))
    return None if changed or run.recipe["model"].get("dequantize") else base_model(run.recipe)


def format_of(run: RunFacts) -> str:
    """Return the format of a run's result: a key of `FORMATS`."""
    result = _result(run)
    if next(result.glob("*.gguf"), None):
        return "gguf"
    for file, format in ((CONFIG, "peft"), ("sqft_adapter.json", "sqft")):
        if (result / file).is_file():
            return format
    if not (result / "config.json").is_file():
        return "other"
    method = _quantization(run).get("quant_method")
    return str(method) if method in FORMATS else "other" if method else "floats"


def _quantization(run: RunFacts) -> dict[str, Any]:
    file = _result(run) / "config.json"
    found = json.loads(file.read_text("utf-8")).get("quantization_config") if file.is_file() else None
    return found if isinstance(found, dict) else {}


def _result(run: RunFacts) -> Path:
    if run.result is None:
        raise SqftError(f"run {run.name} has no result in the store; run its recipe again, up to search or merge")
    return run.result


def _artifact(run: RunFacts) -> Artifact:
    """Return the artifact that holds the result."""
    folder = _result(run).parent.name
    return next(artifact for artifact in run.artifacts.values() if artifact.folder.name == folder)


def _files(run: RunFacts) -> dict[str, Path]:
    """Return the files of the result that its artifact lists, by name."""
    artifact, part = _artifact(run), _result(run).name
    listed = [PurePath(name) for name in artifact.manifest["files"]]
    return {name.relative_to(part).as_posix(): artifact.folder / name for name in listed if name.parts[0] == part}


def _made(run: RunFacts) -> list[str]:
    """Return the steps up to the one that wrote the result."""
    names, folder = list(run.record["artifacts"]), _result(run).parent.name
    writers = [index for index, link in enumerate(run.record["artifacts"].values()) if PurePath(link).name == folder]
    return names[: max(writers, default=-1) + 1]


def _final_row(run: RunFacts) -> Mapping[str, Any] | None:
    """Return the measurements of the last model up to the result; None when it was not measured."""
    made = ["model", *(name for name in _made(run) if name in ("sparsify", "quantize", "search", "merge"))]
    rows = {row["configuration"].partition(" ")[0]: row for row in run.report["rows"]}
    return rows.get(made[-1])


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
        yield result(text, "perplexity", found["perplexity"])
    for task, metrics in row["tasks"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                yield result(task, metric.partition(",")[0], value)


def _sparsity(run: RunFacts) -> float | None:
    """Return what share of the weights the last step up to the result left at zero; None when none of them pruned."""
    made = [name for name in ("merge", "quantize", "sparsify") if name in _made(run) and name in run.artifacts]
    found = [run.artifacts[name].report["sparsity"] for name in made if "sparsity" in run.artifacts[name].report]
    return next(iter(found), None) if "sparsify" in run.recipe else None


def _bits(run: RunFacts) -> int | None:
    """Return how many bits a weight of a linear layer has in the result; None of floats."""
    format, steps = format_of(run), [run.artifacts[name].report for name in _made(run) if name in run.artifacts]
    coded = next((report["bits"] for report in reversed(steps) if report.get("bits")), None)
    bits = _quantization(run).get("bits") or coded
    return int(bits) if bits and format in ("gptq", "compressed-tensors", "gguf") else None


def _hub_data(recipe: Mapping[str, Any]) -> set[str]:
    """Return the ids of data sets on the hub that a stored recipe calibrates and trains with."""
    marked = fields_marked(Recipe, InputPath, copy.deepcopy(dict(recipe)))
    used = (("calibration", "data"), ("finetune", "data"))
    named = [field.value for field in marked if field.marker.hub and field.place[:2] in used]
    return {value for value in named if isinstance(value, str) and HUB_ID.fullmatch(value)}


def _license(recipe: Mapping[str, Any]) -> str | None:
    """Return the licence that the card in the base model's own folder names."""
    import yaml
    from huggingface_hub.repocard import metadata_load

    file = Path(str(recipe["model"]["path"])) / CARD
    try:
        named = (metadata_load(file) or {}).get("license") if file.is_file() else None
    except (OSError, ValueError, yaml.YAMLError):
        return None
    return named if isinstance(named, str) else None
