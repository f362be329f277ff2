"""The errors that sqft explains to its users.

An `SqftError` is a problem that the user can fix: it is printed as one message without a traceback, and
the command exits with status 2. Anything else is a bug in sqft and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class SqftError(Exception):
    """Base class of the others: a problem that the user can fix."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, and where it is: `place` is a path in the recipe, a file or the name of a tensor."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class RecipeError(SqftError):
    """All mistakes in a recipe, each with its path in the file."""

    def __init__(self, problems: Sequence[Problem], source: str = "recipe", rest: Any = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        self.rest = rest
        """The recipe without these mistakes, if enough of it is left to look for others; else None."""
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


class PluginError(SqftError):
    """A plugin is missing, broken, installed twice, or raised an exception; the message names plugin and version."""


class ContractError(SqftError):
    """A component returned something that its contract forbids; the message names it and the tensor."""


class StageError(SqftError):
    """A stage cannot work with its inputs."""


class StoreError(SqftError):
    """The store cannot be read or written, or its disk is full; the message names the store."""


class ModelError(SqftError):
    """A model, or its tokenizer, cannot be loaded, or sqft cannot work on it; the message names the model."""


class HubError(SqftError):
    """A model, adapter or data set of the Hugging Face hub is not in its cache and cannot be downloaded."""


class DeviceError(SqftError):
    """A device, or one of the processes of a run, cannot be used; the message names it."""


class ArtifactError(SqftError):
    """An artifact, checkpoint or model file is missing, damaged, or not what was promised."""


class DataError(SqftError):
    """A data file is not what the recipe says; the message names file and line."""
