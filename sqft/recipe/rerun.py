"""Run a stored recipe again, from any folder: up to the merge, or to measure its finished steps."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from sqft.errors import HubError, SqftError
from sqft.recipe.fields import OutputPath, fields_marked
from sqft.recipe.reading import apply
from sqft.recipe.recipe import Recipe
from sqft.recipe.stages import STAGES
from sqft.types import InputPath
from sqft.utils.files import MANIFEST
from sqft.utils.hub import HUB_ID, fetch, is_hub_id
from sqft.utils.peft_config import CONFIG, read_config

MEASURES = ("perplexity", "exact_match", "tasks")
MEASURED = ".eval"
"""Suffix of the name of a run that measures another run."""


def paths(recipe: Recipe) -> dict[str, str]:
    """Return the files and folders of data that a recipe names, as it writes them, by their places in it."""
    raw = recipe.model_dump(mode="json", by_alias=True)
    marked = fields_marked(type(recipe), InputPath, raw)
    return {".".join(field.place): field.value for field in marked if field.value and field.place[0] != "model"}


def with_absolute_paths(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain data that can be stored anywhere: its paths, relative to its own folder, made absolute.

    Defaults are left out, since some give way to the model where a number that the user wrote must fit.
    """
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=True, exclude={"json_schema"})
    for field in fields_marked(type(recipe), (InputPath, OutputPath), raw):
        path = recipe.resolve(field.value)
        hub = isinstance(field.marker, InputPath) and field.marker.hub and HUB_ID.fullmatch(field.value)
        if path.exists() or not hub:
            field.holder[field.key] = str(path)
    return raw


def evaluation_overrides(raw: Mapping[str, Any], of: Sequence[str], measures: Mapping[str, Any]) -> list[str]:
    """Return the changes with which a stored recipe measures `of` and makes only what that needs.

    Without `measures`, it measures what the recipe does. Settings of the recipe for one of `measures` still apply.

    Raises:
        SqftError: when neither says what to measure.
    """
    own: dict[str, Any] = raw.get("evaluate") or {}
    section = {key: value for key, value in own.items() if key not in (*MEASURES, "of")} if measures else {**own}
    for name, value in measures.items():
        section[name] = _with_settings(own.get(name) or {}, value)
    if not any(section.get(name) for name in MEASURES):
        raise SqftError("say what to measure: --tasks, --perplexity or --exact-match; the recipe measures nothing")
    kept = {what.partition(":")[0] for what in of}
    if kept & {"finetune", "search", "merge"}:
        kept |= {"finetune", "search", "sparsify", "quantize"}
    elif "quantize" in kept:
        kept.add("sparsify")
    made = [stage.name for stage in STAGES if stage.evaluable]
    changes = [f"{name}=null" for name in made if name not in kept and raw.get(name) is not None]
    if "merge" in kept:
        changes.append("merge={}")
    name = json.dumps(f"{raw['name'].removesuffix(MEASURED)}{MEASURED}")  # `sqft merge NAME` is to find the other one
    return [*changes, "export=[]", f"name={name}", f"evaluate={json.dumps({**section, 'of': list(of)})}"]


def _with_settings(own: Any, value: Any) -> Any:
    """Return what is to be measured, with the recipe's own settings; those of its first text, if it has several."""
    if isinstance(value, list):
        return [_with_settings(own, one) for one in value]
    own = own[0] if isinstance(own, list) and own else own
    return {**own, **value} if isinstance(value, dict) and isinstance(own, dict) else value


def completed_steps(raw: Mapping[str, Any], reused: Callable[[Recipe], Collection[str]]) -> list[str]:
    """Return the finished steps of a stored recipe that can be measured; `reused` returns which steps are finished."""
    if not any(raw.get(stage.name) is not None for stage in STAGES if stage.evaluable):
        return ["model"]
    done = reused(Recipe.parse({**raw, "evaluate": None, "export": []}, source=raw["name"]))
    return [stage.name for stage in STAGES if stage.evaluable == stage.name and stage.name in done]


def recipe_of_model(model: Path | str, changes: Sequence[str] = ()) -> dict[str, Any]:
    """Return a recipe that has only a model, in the precision in which it is stored; of a PEFT adapter, its base, on
    which the adapter is to be measured.

    Args:
        model: a folder, a GGUF file or a Hugging Face id; or a store's artifact that has a model or an adapter.
        changes: those of `--set` that will be made in the recipe. They may pin what is downloaded, and name the
            adapter's base, which then need not be found.

    Raises:
        HubError: when it cannot be downloaded.
        SqftError: when it is an adapter that cannot be measured, or whose base is not there.
    """
    path, given = Path(model), _texts_of(changes, str(model))
    if is_hub_id(str(model), path):
        named, stem, called = str(model), str(model).rpartition("/")[2], f"the hub's {model}"
        path = _configs_on_the_hub(named, given)
    else:
        if (path / MANIFEST).is_file():
            path = next(filter(Path.is_dir, (path / "model", path / "adapter")), path)
        named, stem, called = str(path.resolve()), path.resolve().stem, str(path)
    name = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-") or "model"
    recipe: dict[str, Any] = {"schema": 1, "name": name, "model": {"path": named, "dtype": "auto"}}
    if (path / "config.json").is_file():
        return recipe
    if (path / "sqft_adapter.json").is_file():
        raise SqftError(
            f"{path} holds an adapter that acts only through its merger; measure the run that made it "
            "(sqft eval RUN --of search)"
        )
    if (path / CONFIG).is_file():
        recipe["evaluate"] = {"of": ["model"], "adapter": named}
        if "model.path" not in given:
            recipe["model"] |= _base_of_adapter(path, called)
    return recipe


def _texts_of(changes: Sequence[str], source: str) -> dict[str, str]:
    """Return the texts that changes of `--set` give to fields of `model` and `evaluate`, by place."""
    given: dict[str, Any] = {"model": {}, "evaluate": {}}
    for change in changes:
        apply(given, change, source, Recipe)
    sections = {name: given[name] for name in ("model", "evaluate") if isinstance(given[name], dict)}
    return {
        f"{name}.{key}": text for name, own in sections.items() for key, text in own.items() if isinstance(text, str)
    }


def _configs_on_the_hub(name: str, given: Mapping[str, str]) -> Path:
    """Return the folder in the hub's cache with the configs of a model or an adapter, at the revision that is given.

    Which of the two it is, only the configs tell; `model.revision` is a model's own, but that of an adapter's base.
    """
    files, local = ("config.json", CONFIG), Path(name)
    is_adapter = given.get("evaluate.adapter", name) == name
    own = given.get("evaluate.adapter_revision") if is_adapter else None
    of_model = given.get("model.revision") if given.get("model.path", name) == name else None
    if of_model and not own:
        with suppress(HubError):  # the base of an adapter has other revisions than the adapter
            folder = fetch("model", name, of_model, files, local)
            if (folder / "config.json").is_file():
                return folder
    return fetch("model", name, own or None, files, local)


def _base_of_adapter(adapter: Path, called: str) -> dict[str, str]:
    """Return what a recipe says in `model` of the base that an adapter's own config names: the path of a folder or file
    that is there; or an id on the hub, with its revision if it has one."""
    config = read_config(adapter, called)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if base and os.path.exists(base):
        return {"path": str(Path(base).resolve())}
    if base and HUB_ID.fullmatch(base):
        return {"path": base, "revision": revision} if revision else {"path": base}
    named = f"'{base}', which is not there" if base else "no base model"
    raise SqftError(f"{CONFIG} of {called} names {named}; add --set model.path=BASE to name it")
