"""Recipes as runs keep them: able to be run again from anywhere."""

from __future__ import annotations

from typing import Any

from sqft.recipe import Recipe

PLACES = (
    "calibration.data",
    "finetune.data.path",
    "search.data.path",
    "evaluate.perplexity.text",
    "evaluate.exact_match.data.path",
    "evaluate.include_path",
)
"""Where a recipe names files and folders; `model.path` may be a Hugging Face id instead."""


def paths(recipe: Recipe) -> dict[str, str]:
    """The files and folders of data that a recipe names, as it writes them, by their places in it."""
    raw = recipe.model_dump(mode="json")
    found = {place: _section(raw, place).get(place.rpartition(".")[2]) for place in PLACES}
    return {place: path for place, path in found.items() if path}


def anchored(recipe: Recipe) -> dict[str, Any]:
    """A recipe as plain data that can be stored anywhere: its relative paths, which count from its own folder, made
    absolute."""
    raw = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    for place, path in paths(recipe).items():
        _section(raw, place)[place.rpartition(".")[2]] = str(recipe.resolve(path))
    model = recipe.resolve(recipe.model.path)
    if model.exists():
        raw["model"]["path"] = str(model)
    return raw


def _section(raw: dict[str, Any], place: str) -> dict[str, Any]:
    here: Any = raw
    for part in place.split(".")[:-1]:
        here = here.get(part) or {}
    section: dict[str, Any] = here
    return section
