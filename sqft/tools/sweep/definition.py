"""What a sweep's file says, and the cells that come of it: a recipe with one value of each axis."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from sqft.errors import Problem, RecipeError
from sqft.recipe.diagnostics import problems_of
from sqft.recipe.fields import Section
from sqft.recipe.reading import read_json

SEED = "seed"
"""The axis over which results are averaged."""
RESERVED = (
    "recipe", "configuration", "accuracy", "stderr", "perplexity", "sparsity", "trainable", "storage", "seconds",
    "peak_memory", "evaluation_seconds", "run",
)  # fmt: skip
"""What results call other things."""
RECIPE = "recipe"
"""Among the settings of a labelled value: another recipe to begin from."""


@dataclass(frozen=True)
class Cell:
    """A recipe with one value of each axis."""

    name: str
    """Of the cell's run: the sweep's name and the values."""
    values: Mapping[str, str]
    """The axes' values, as results show them."""
    recipe: Path
    """The file that it begins from."""
    changes: tuple[str, ...]
    """What is changed there, as `--set` takes it."""

    def __str__(self) -> str:
        return ", ".join(f"{axis} {value}" for axis, value in self.values.items())


class Sweep(Section):
    """A recipe and axes: a cell for each combination of their values.

    An axis is a place in the recipe with a list of values (`"seed": [0, 1, 2]`), or a name with labelled values, each
    with the settings that it stands for (`"adapter": {"LoRA": {"finetune.adapter": "lora"}}`). Among these, `recipe`
    names another recipe file to begin from.
    """

    schema_: Literal[1] = Field(1, alias="schema", description="version of the format of sweeps")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the sweep's folder of results")
    recipe: str | None = Field(None, description="recipe file that cells begin from, unless an axis names another")
    set: dict[str, Any] = Field({}, description="settings of all cells, by their places in the recipe")
    axes: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(
        min_length=1, description="the values of each axis; the last axis changes fastest"
    )
    skip: tuple[dict[str, Any], ...] = Field((), description="cells that are left out: all that have these values")

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _source: str = PrivateAttr(default="sweep")

    @classmethod
    def load(cls, path: str | Path) -> Sweep:
        """Read a sweep's file.

        Raises:
            RecipeError: with every mistake and its path in the file.
        """
        path = Path(path)
        return cls.parse(read_json(path), path.resolve().parent, str(path))

    @classmethod
    def parse(cls, raw: object, folder: Path | None = None, source: str = "sweep") -> Sweep:
        """Make a sweep of plain data; recipe files are relative to `folder`.

        Raises:
            RecipeError: with every mistake and its path.
        """
        if not isinstance(raw, dict):
            raise RecipeError([Problem("", f"expected a JSON object, found {type(raw).__name__}")], source)
        try:
            made = cls.model_validate(raw)
        except ValidationError as error:
            raise RecipeError(problems_of(error, cls), source) from None
        made._folder, made._source = (folder or Path.cwd()).resolve(), source
        if problems := made._problems():
            raise RecipeError(problems, source)
        return made

    @property
    def source(self) -> str:
        """The sweep's file, for messages."""
        return self._source

    def cells(self, changes: Sequence[str] = ()) -> list[Cell]:
        """Return a cell for each combination of values that is not left out; `changes` are made in all, last."""
        cells = []
        for chosen in product(*(self._values(axis) for axis in self.axes)):
            values = {axis: label for axis, (label, _) in zip(self.axes, chosen, strict=True)}
            if any(one.items() <= values.items() for one in self._skipped()):
                continue
            settings = dict(self.set)
            for _, given in chosen:
                settings |= given
            recipe = settings.pop(RECIPE, self.recipe)
            name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join((self.name, *values.values()))).rstrip("-.")
            words = [f"{place}={json.dumps(value)}" for place, value in settings.items()]
            cells.append(Cell(name, values, self._folder / str(recipe), (*words, *changes, f"name={json.dumps(name)}")))
        return cells

    def _values(self, axis: str) -> list[tuple[str, dict[str, Any]]]:
        """Return an axis's values: how each is shown, and its settings."""
        given = self.axes[axis]
        return list(given.items()) if isinstance(given, dict) else [(_shown(value), {axis: value}) for value in given]

    def _skipped(self) -> list[dict[str, str]]:
        return [{axis: _shown(value) for axis, value in one.items()} for one in self.skip]

    def _problems(self) -> list[Problem]:
        problems = []
        for axis in self.axes:
            labels = [label for label, _ in self._values(axis)]
            if axis in RESERVED:
                problems.append(Problem(f"axes.{axis}", "is what results call something else; choose another name"))
            if not labels:
                problems.append(Problem(f"axes.{axis}", "has no values; give some, or remove this axis"))
            if twice := sorted({label for label in labels if labels.count(label) > 1}):
                problems.append(Problem(f"axes.{axis}", f"has {twice[0]} twice; keep one"))
            if self.recipe is None and not any(
                all(RECIPE in settings for _, settings in self._values(other)) for other in self.axes
            ):
                problems.append(Problem("recipe", "is missing; name a recipe file, here or for each value of an axis"))
                break
        for index, one in enumerate(self._skipped()):
            for axis, label in one.items():
                if axis not in self.axes or label not in dict(self._values(axis)):
                    problems.append(Problem(f"skip.{index}.{axis}", f"no axis '{axis}' has the value {label}"))
        return problems


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
