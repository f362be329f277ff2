"""A recipe: its sections, and how it is read from a file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError

from sqft.errors import Problem, RecipeError, SqftError
from sqft.recipe.diagnostics import problems_of, without_mistakes
from sqft.recipe.fields import RUN_NAME, Section
from sqft.recipe.reading import apply, checked_object, read_json
from sqft.recipe.sections import Calibration, Evaluate, Export, Finetune, Merge, Model, Quantize, Search, Sparsify
from sqft.utils.text import brief


class Recipe(Section):
    """A complete recipe. A section that is left out is a step that does not run."""

    schema_: Literal[1] = Field(1, alias="schema", description="version of the recipe format")
    json_schema: str | None = Field(
        None, alias="$schema", description="path of the file that `sqft schema` wrote, for editors"
    )
    name: str = Field(pattern=RUN_NAME, description="name of the run's folder; it has no other effect")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="the source of all randomness")
    model: Model
    calibration: Calibration | None = None
    sparsify: Sparsify | None = None
    quantize: Quantize | None = None
    finetune: Finetune | None = None
    search: Search | None = None
    merge: Merge | None = None
    export: tuple[Export, ...] = ()
    evaluate: Evaluate | None = None

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _source: str = PrivateAttr(default="recipe")

    @property
    def folder(self) -> Path:
        """The folder that relative paths are resolved against: the recipe's own."""
        return self._folder

    @property
    def source(self) -> str:
        """The recipe's file, for messages."""
        return self._source

    def resolve(self, path: str) -> Path:
        """Return the absolute path on this machine of a path in the recipe.

        Raises:
            SqftError: when it is not a valid path (it holds a NUL, names an unknown user's home, or is too long).
        """
        try:
            resolved = (self._folder / Path(path).expanduser()).resolve()
            resolved.exists()  # fails for a name that is too long
        except (OSError, RuntimeError, ValueError) as error:
            raise SqftError(f"{brief(path)} is not a valid path on this machine: {error}") from None
        return resolved

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> Recipe:
        """Read a recipe file; each change is "path=value" with dots ("sparsify.sparsity=0.6").

        Raises:
            RecipeError: with every mistake and its path in the file.
        """
        path = Path(path)
        return cls.changed(read_json(path), changes, path.resolve().parent, str(path))

    @classmethod
    def changed(cls, raw: Any, changes: Sequence[str], folder: Path | None = None, source: str = "recipe") -> Recipe:
        """Make a recipe from plain data, after making changes in that data.

        Raises:
            RecipeError: with every mistake and its path.
        """
        raw = copy.deepcopy(checked_object(raw, source))
        wrong: list[Problem] = []
        for change in changes:
            try:
                apply(raw, change, source, cls)
            except RecipeError as error:
                wrong += error.problems
        try:
            recipe = cls.parse(raw, folder, source)
        except RecipeError as error:
            raise RecipeError([*wrong, *error.problems], source, error.rest) from None
        if wrong:
            raise RecipeError(wrong, source, recipe)
        return recipe

    @classmethod
    def parse(cls, raw: object, folder: Path | None = None, source: str = "recipe") -> Recipe:
        """Make a recipe from plain data.

        Raises:
            RecipeError: with every mistake and its path.
        """
        raw = checked_object(raw, source)
        try:
            return cls.model_validate(raw)._at(folder, source)
        except ValidationError as error:
            rest = without_mistakes(cls, raw)
            raise RecipeError(problems_of(error, cls), source, rest and rest._at(folder, source)) from None

    def _at(self, folder: Path | None, source: str) -> Recipe:
        self._folder = (folder or Path.cwd()).resolve()
        self._source = source
        return self
