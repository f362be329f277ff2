"""What a sweep's file says, and the cells that come of it: a recipe with one value of each axis."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from sqft.errors import Problem, RecipeError
from sqft.recipe.diagnostics import problems_of, related
from sqft.recipe.fields import RUN_NAME, Section
from sqft.recipe.reading import checked_object, read_json

SEED = "seed"
"""The axis over which results are averaged."""
RESERVED = (
    "name", "recipe", "run", "configuration", "accuracy", "stderr", "perplexity", "sparsity", "trainable", "storage",
    "seconds", "peak_memory", "evaluation_seconds",
)  # fmt: skip
"""What results call other things."""
NOT_SET = {"name": "is made of the sweep's name and the values", "recipe": "has a place of its own in the sweep"}
"""What settings may not hold: why."""
NO_NAME = re.compile(r"[^A-Za-z0-9._-]+")
LONGEST = 100
"""Letters of a run's name, besides a digest."""
RECIPE = "recipe"
"""Among the settings of a labelled value: another recipe to begin from."""


Combination = tuple[tuple[str, str], ...]
"""A value of each axis besides the seed's."""


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
        return shown_values(self.values.items())

    @property
    def combination(self) -> Combination:
        """The values besides the seed's."""
        return tuple((axis, value) for axis, value in self.values.items() if axis != SEED)


class Sweep(Section):
    """A recipe and axes: a cell for each combination of their values.

    An axis is a place in the recipe with a list of values (`"seed": [0, 1, 2]`), or a name with labelled values, each
    with the settings that it stands for (`"adapter": {"LoRA": {"finetune.adapter": "lora"}}`). Among these, `recipe`
    names another recipe file to begin from.
    """

    schema_: Literal[1] = Field(1, alias="schema", description="version of the format of sweeps")
    json_schema: str | None = Field(
        None, alias="$schema", description="path of the file that `sqft schema --sweep` wrote, for editors"
    )
    name: str = Field(pattern=RUN_NAME, description="name of the sweep's folder of results")
    recipe: str | None = Field(
        None, min_length=1, description="recipe file that cells begin from, unless an axis names another"
    )
    set: dict[str, Any] = Field({}, description="settings of all cells, by their places in the recipe")
    axes: dict[str, Any] = Field(
        min_length=1,
        description="each axis's values, a list, or settings by label; the last axis changes fastest",
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
        try:
            made = cls.model_validate(checked_object(raw, source))
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

    def named(self, changes: Sequence[str] = ()) -> str:
        """Return the name of the results, and the beginning of the runs' names; `changes` have others than the file."""
        return f"{self.name}-{short_digest(changes)}" if changes else self.name

    def cells(self, changes: Sequence[str] = ()) -> list[Cell]:
        """Return a cell for each combination of values that is not left out; `changes` are made in all, last.

        Raises:
            RecipeError: when a change is of something that an axis sets, or that no setting may hold.
        """
        problems = []
        for place in (change.partition("=")[0] for change in changes if "=" in change):
            set_by = [axis for axis in self.axes if any(related(place, one) for one in self._places(axis))]
            problems += [Problem(f"axes.{axis}", f"sets what --set {place} changes, too") for axis in set_by]
            problems += [Problem(place, f"--set {place}: {NOT_SET[place]}")] if place in NOT_SET else []
        if problems:
            raise RecipeError(problems, self.source)
        cells, names, skipped = [], self._names(self.named(changes)), self._skipped()
        for chosen in product(*(self._values(axis) for axis in self.axes)):
            values = {axis: label for axis, (label, _) in zip(self.axes, chosen, strict=True)}
            if any(one.items() <= values.items() for one in skipped):
                continue
            settings = dict(self.set)
            for given in (given for _, given in chosen):
                settings = {place: value for place, value in settings.items() if not _within(place, given)} | given
            recipe, name = settings.pop(RECIPE, self.recipe), names[*values.values()]
            words = [f"{place}={json.dumps(value)}" for place, value in settings.items()]
            cells.append(Cell(name, values, self._folder / str(recipe), (*words, *changes, f"name={json.dumps(name)}")))
        return cells

    def _values(self, axis: str) -> list[tuple[str, dict[str, Any]]]:
        """Return an axis's values: how each is shown, and its settings."""
        given = self.axes[axis]
        return list(given.items()) if isinstance(given, dict) else [(_shown(value), {axis: value}) for value in given]

    def _names(self, first: str) -> dict[tuple[str, ...], str]:
        """Return the name of each combination's run: of its values, and a digest where that is long or not its own."""
        labels = product(*([label for label, _ in self._values(axis)] for axis in self.axes))
        plain = {values: NO_NAME.sub("-", "-".join((first, *values))).rstrip("-.") for values in labels}
        names = Counter(plain.values())
        unclear = {values for values, name in plain.items() if names[name] > 1 or len(name) > LONGEST}
        return {
            values: f"{name[:LONGEST]}-{short_digest((first, *values))}" if values in unclear else name
            for values, name in plain.items()
        }

    def _places(self, axis: str) -> list[str]:
        """Return what an axis sets, besides the recipe to begin from."""
        return sorted({place for _, settings in self._values(axis) for place in settings if place != RECIPE})

    def _skipped(self) -> list[dict[str, str]]:
        return [{axis: _shown(value) for axis, value in one.items()} for one in self.skip]

    def _problems(self) -> list[Problem]:
        problems = [problem for axis, given in self.axes.items() for problem in _problems_of_axis(axis, given)]
        problems += _problems_of_settings("set", self.set)
        if problems:
            return problems
        if self.recipe is None and not any(
            all(RECIPE in settings for _, settings in self._values(axis)) for axis in self.axes
        ):
            problems.append(Problem("recipe", "is missing; name a recipe file, here or for each value of an axis"))
        for one, other in combinations(self.axes, 2):
            if both := [a for a in self._places(one) for b in self._places(other) if related(a, b)]:
                problems.append(
                    Problem(f"axes.{other}", f"sets {both[0]}, as the axis {one} does; make one axis of both")
                )
        for index, skipped in enumerate(self._skipped()):
            for axis, label in skipped.items():
                if axis not in self.axes or label not in dict(self._values(axis)):
                    problems.append(Problem(f"skip.{index}.{axis}", f"no axis '{axis}' has the value {label}"))
        return problems


def shown_values(values: Iterable[tuple[str, str]]) -> str:
    """Return axes with their values as text."""
    return ", ".join(f"{axis} {value}" for axis, value in values)


def short_digest(values: Sequence[str]) -> str:
    """Return a digest of a few letters, for a name."""
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def _problems_of_axis(axis: str, given: Any) -> list[Problem]:
    place = f"axes.{axis}"
    if not axis or "=" in axis:
        return [Problem(place, "is no name of an axis")]
    if axis in RESERVED:
        return [Problem(place, "is what results call something else; choose another name")]
    if not isinstance(given, list | dict):
        return [Problem(place, "expected a list of values, or an object of labels")]
    if not given:
        return [Problem(place, "has no values; give some, or remove this axis")]
    if isinstance(given, list):
        shown = [_shown(value) for value in given]
        return [Problem(place, f"has {value} twice; keep one") for value in {*shown} if shown.count(value) > 1]
    problems = [] if axis != SEED else [Problem(place, "is the axis of seeds, expected a list of numbers")]
    for label, settings in given.items():
        where = f"{place}.{label}"
        if not isinstance(settings, dict):
            problems.append(Problem(where, "expected an object: the settings that the label stands for"))
            continue
        if not isinstance(settings.get(RECIPE, "a"), str):
            problems.append(Problem(f"{where}.{RECIPE}", "expected the path of a recipe file"))
        problems += _problems_of_settings(where, {key: value for key, value in settings.items() if key != RECIPE})
    return problems


def _problems_of_settings(where: str, settings: Mapping[str, Any]) -> list[Problem]:
    wrong = {key: NOT_SET.get(key, "is no place in a recipe") for key in settings if key in NOT_SET or "=" in key}
    return [Problem(f"{where}.{key}", why) for key, why in wrong.items()]


def _within(place: str, others: Iterable[str]) -> bool:
    return any(f"{place}.".startswith(f"{other}.") for other in others)


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
