"""The failures sqft explains to people.

An `SqftError` is something the user can mend: it is printed as one message without a traceback and
the command exits with status 2. Anything else is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


class SqftError(Exception):
    """Base of every error that is the user's to mend."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake and where it stands: `place` is a path in the recipe, a file or a tensor's name."""

    place: str
    message: str

    def __str__(self) -> str:
        return f"{self.place}: {self.message}" if self.place else self.message


class RecipeError(SqftError):
    """Everything that is wrong with a recipe, collected, each with its path in the file."""

    def __init__(self, problems: Sequence[Problem], source: str = "recipe", rest: Any = None) -> None:
        self.problems = tuple(problems)
        self.source = source
        self.rest = rest
        """The recipe without these mistakes, when enough is left of it to look for others."""
        count = len(self.problems)
        head = f"{source}: {count} problem{'s' if count != 1 else ''}"
        super().__init__("\n".join([head, *(f"  {problem}" for problem in self.problems)]))


class PluginError(SqftError):
    """A plugin is missing, broken, or offered twice; the message names plugin, distribution, version."""


class ContractError(SqftError):
    """A component returned something its contract forbids; the message names it and the tensor."""


class StageError(SqftError):
    """A stage could not do its work with what it was given."""


class StoreError(SqftError):
    """The store cannot be read or written, or its disk is full; the message names the store."""


class ModelError(SqftError):
    """A model, or its tokenizer, cannot be loaded, or sqft cannot work on it; the message names the model."""


class DeviceError(SqftError):
    """A device, or one of the processes of a run, cannot be used; the message names it."""


class ArtifactError(SqftError):
    """An artifact, checkpoint or model folder is missing, damaged, or breaks its promise."""


class DataError(SqftError):
    """A data file cannot be read as what the recipe says it is; the message names file and line."""
