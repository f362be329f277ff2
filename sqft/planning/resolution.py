"""Names and paths of a recipe become components, files and layers, or problems with their places."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.source import find_model
from sqft.components.registry import Registry
from sqft.data.answers import Answer, completion_of, extract_answer
from sqft.data.hub import fetch_data_set
from sqft.data.readers import SUFFIXES, split_names, suffix_of
from sqft.data.records import records_of
from sqft.errors import DataError, Problem, SqftError
from sqft.planning.plan import ResolvedComponent
from sqft.recipe.data import Data
from sqft.recipe.diagnostics import problems_of
from sqft.recipe.fields import Section
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import ComponentRef, Finetune
from sqft.types import LinearShape
from sqft.utils.digests import Digests
from sqft.utils.hub import HUB_ID
from sqft.utils.patterns import selected

S = TypeVar("S", bound=Section)


BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class Resolver:
    """Collects every problem it meets instead of stopping at the first."""

    def __init__(self, recipe: Recipe, registry: Registry, digests: Digests) -> None:
        self.recipe, self.registry, self.digests = recipe, registry, digests
        self.problems: list[Problem] = []
        self.broken: dict[str, None] = {}
        self.source: ModelSource | None = None

    def _model(self) -> None:
        model = self.recipe.model
        try:
            self.source = find_model(model.path, self.recipe.resolve, model.revision, self.digests)
        except SqftError as error:
            self._problem("model.path", str(error))

    def _part(self, kind: str, ref: ComponentRef, place: str) -> ResolvedComponent[Any] | None:
        """The component a recipe names, with its options validated against its own fields."""
        try:
            registration = self.registry.get(kind, ref.name)
        except SqftError as error:
            # Which plugins are broken may explain several problems; it is said once, at the end.
            reason, *broken = str(error).splitlines()
            self._problem(place, reason)
            self.broken |= dict.fromkeys(broken)
            return None
        try:
            return ResolvedComponent(registration, registration.component.model_validate(ref.options))
        except ValidationError as error:
            self.problems += problems_of(error, registration.component, f"{place}.options")
        except (Exception, SystemExit) as error:  # a validator of the plugin's own
            self._problem(f"{place}.options", f"{registration} raised {type(error).__name__}: {error}")
        return None

    def _file(self, path: str, place: str, folder: bool = False) -> Path:
        """A file or folder of the recipe's, which must be there, readable and not empty."""
        try:
            resolved = self.recipe.resolve(path)
        except SqftError as error:
            self._problem(place, str(error))
            return Path(path)
        if not (resolved.is_dir() if folder else resolved.is_file()):
            self._problem(place, f"there is no {'folder' if folder else 'file'} {resolved}")
        elif not os.access(resolved, os.R_OK):
            self._problem(place, f"{resolved} may not be read; change its permissions")
        elif not folder and resolved.stat().st_size == 0:
            self._problem(place, f"{resolved} is empty")
        return resolved

    def _data_set(self, data: Data, place: str) -> Path:
        """A file of records, a folder that is a data set, or the folder of one fetched from Hugging Face."""
        try:
            names = split_names(data.split)
        except DataError as error:
            self._problem(f"{place}.split", str(error))
            return Path(data.path)
        try:
            path = self.recipe.resolve(data.path)
            if HUB_ID.fullmatch(data.path) and suffix_of(path) not in SUFFIXES and not path.exists():
                return fetch_data_set(data.path, data.revision, path)
        except SqftError as error:
            self._problem(f"{place}.path", str(error))
            return Path(data.path)
        if path.is_file() and (said := data.model_fields_set & {"config", "revision"}):
            self._problem(f"{place}.path", f"is one file, and has no {min(said)}; remove that, or name a data set")
        elif path.is_file() and names != {"train"}:
            self._problem(f"{place}.split", "one file has no split but 'train', whole or sliced (train[:90%])")
        return self._file(data.path, f"{place}.path", folder=path.is_dir())

    def _records(self, data: Data, place: str, answer: Answer | None = None) -> Path:
        """A file of records, every one of which is read; with `answer`, each has one to compare with."""
        known = len(self.problems)
        path = self._data_set(data, place)
        if len(self.problems) > known:
            return path
        try:
            for record in records_of(path, data):
                if answer and not extract_answer(completion_of(record), answer):
                    what = "completion" if answer == "text" else "number in the completion"
                    raise DataError(f"{record.location}: there is no {what} to compare with")
        except DataError as error:
            self._problem(f"{place}.path", str(error).replace("\n", "\n    "))
        return path

    def _training_data(self, section: Finetune, answer: Answer | None = None) -> dict[str, Path]:
        """The files of `finetune.data` by their roles."""
        place = "finetune.data.{}" if isinstance(section.data, tuple) else "finetune.data"
        return {
            role: self._records(data, place.format(index), answer)
            for index, (role, data) in enumerate(section.data_sets.items())
        }

    def _chosen(self, include: Iterable[str], exclude: Iterable[str], place: str) -> list[LinearShape]:
        if self.source is None:
            return []
        chosen = [linear for linear in self.source.linears if selected(linear.name, include, exclude)]
        if not chosen:
            self._problem(place, f"matches no linear layer of the model; it has {self._last_names()}")
        return chosen

    def _last_names(self) -> str:
        names = {linear.name.rpartition(".")[2] for linear in self.source.linears} if self.source else set()
        return ", ".join(sorted(names)) or "none in numbered blocks, but for what routes to experts"

    def _within_window(self, section: S, field: str, place: str, always: bool = False) -> S:
        """The section with a number of tokens no larger than the model's window; one the user wrote must fit.

        `always`: the default must fit too.
        """
        window, tokens = self.source.size("max_position_embeddings") if self.source else 0, getattr(section, field)
        if not window or tokens <= window:
            return section
        if always or field in section.model_fields_set:
            self._problem(f"{place}.{field}", f"{tokens} tokens, but the model's window is {window}")
        return section.model_copy(update={field: window})

    def _weights(self) -> tuple[int, int]:
        """Parameters of the model and their bytes in the recipe's precision."""
        parameters = self.source.parameters if self.source else 0
        return parameters, parameters * BYTES[self.recipe.model.dtype]

    def _in_codes(self, chosen: Sequence[LinearShape], bits: float | None) -> int:
        """About the bytes of a quantized model: codes of so many bits, as many as a float's where nothing says, with a
        scale and a zero point of each group and a mask, all else as it is, and a head of its own."""
        parameters, _ = self._weights()
        width = BYTES[self.recipe.model.dtype]
        codes = sum(layer.out_features * layer.in_features for layer in chosen)
        bits = (bits or 8 * width) + 0.5 + 1
        tied = self.source and not any(name.startswith(("lm_head", "output.")) for name in self.source.shapes)
        head = self.source.size("vocab_size") * self.source.size("hidden_size") if self.source and tied else 0
        return int((parameters - codes + head) * width + codes * bits / 8)

    def _problem(self, place: str, message: str) -> None:
        if (problem := Problem(place, message)) not in self.problems:  # two sections may need the same file
            self.problems.append(problem)
