"""Run a stored recipe again, from any folder: up to the merge, or to measure its finished steps."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqft.errors import SqftError
from sqft.recipe.fields import OutputPath, fields_marked
from sqft.recipe.recipe import Recipe
from sqft.recipe.stages import STAGES
from sqft.types import InputPath
from sqft.utils.files import MANIFEST
from sqft.utils.hub import HUB_ID, fetch

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


def recipe_of_model(model: Path | str, names_base: bool = False) -> dict[str, Any]:
    """Return a recipe that has only a model, in the precision in which it is stored; of a PEFT adapter, its base, on
    which the adapter is to be measured.

    Args:
        model: a folder, a GGUF file or a Hugging Face id; or a store's artifact that has a model or an adapter.
        names_base: whether the user names the adapter's base, so that it need not be found.

    Raises:
        SqftError: when it is an adapter that cannot be measured, or whose base is not there; or when it cannot be
            downloaded.
    """
    path = Path(model)
    if is_hub_id(str(model)):
        named, stem = str(model), str(model).rpartition("/")[2]
        path = fetch("model", named, None, ("config.json", "adapter_config.json"), path)
    else:
        if (path / MANIFEST).is_file():
            path = next(filter(Path.is_dir, (path / "model", path / "adapter")), path)
        named, stem = str(path.resolve()), path.resolve().stem
    name = re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-") or "model"
    recipe: dict[str, Any] = {"schema": 1, "name": name, "model": {"path": named, "dtype": "auto"}}
    if (path / "config.json").is_file():
        return recipe
    if (path / "sqft_adapter.json").is_file():
        raise SqftError(
            f"{path} holds an adapter that acts only through its merger; measure the run that made it "
            "(sqft eval RUN --of search)"
        )
    if (path / "adapter_config.json").is_file():
        base, revision = ("BASE", None) if names_base else _base_of_adapter(path)
        recipe["model"]["path"] = base if is_hub_id(base) else str(_absolute(base))
        recipe["model"] |= {"revision": revision} if revision else {}
        recipe["evaluate"] = {"of": ["model"], "adapter": named}
    return recipe


def is_hub_id(name: str) -> bool:
    """Return whether a name is a Hugging Face id: what is on this machine goes before."""
    return HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def _absolute(path: str) -> Path:
    return Path(path).expanduser().resolve()


def _base_of_adapter(adapter: Path) -> tuple[str, str | None]:
    """Return the base model that an adapter's own config names: a folder or file that is there, or an id on the hub,
    with its revision."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SqftError(f"{adapter / 'adapter_config.json'} cannot be read: {error}; copy the adapter again") from None
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if isinstance(base, str) and base and (_absolute(base).exists() or HUB_ID.fullmatch(base)):
        return base, str(config.get("revision") or "") or None if is_hub_id(base) else None
    named = f"'{base}', which is not there" if base else "no base model"
    raise SqftError(f"{adapter / 'adapter_config.json'} names {named}; add --set model.path=BASE to name it")
