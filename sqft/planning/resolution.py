"""Turn the names, paths and patterns of a recipe into components, files and layers, and collect what is wrong."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

from pydantic import ValidationError

from sqft.checkpoints.chat_template import stored_template
from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.narrow import NARROW
from sqft.checkpoints.source import find_model
from sqft.components.kinds import Component
from sqft.components.options import input_paths
from sqft.components.registry import Registry
from sqft.data.answers import Answer, completion_of, extract_answer
from sqft.data.readers import is_plain_text
from sqft.data.records import records_of
from sqft.errors import DataError, Problem, SqftError
from sqft.planning import data_sets, layout_checks
from sqft.planning.conversations import ConversationCheck, Use
from sqft.planning.plan import ResolvedComponent, model_spec
from sqft.recipe.data import CalibrationData, Data
from sqft.recipe.diagnostics import problems_of
from sqft.recipe.fields import Section, fields_marked
from sqft.recipe.recipe import Recipe
from sqft.recipe.sections import ComponentRef
from sqft.recipe.teacher import DENSE, Teacher
from sqft.types import InputPath, LinearShape
from sqft.utils.digests import Digests
from sqft.utils.globs import names_itself, selected

C = TypeVar("C", bound=Component)
S = TypeVar("S", bound=Section)

Describe = Callable[[ModelSpec, ModelSource], ModelLayout]
"""Tells what the modules of a model are, given how it is loaded and what its headers say; raises SqftError."""

NO_MODEL = ModelSource("folder", Path(), "", {})
"""Takes the place of a model that was not found: without sizes and layers, so that the rest can still be checked."""


class Resolver:
    """Looks up what a recipe names. A mistake becomes a problem with its path in the recipe; nothing is raised."""

    def __init__(self, recipe: Recipe, registry: Registry, digests: Digests, describe: Describe) -> None:
        self.recipe, self.registry, self.digests, self.describe = recipe, registry, digests, describe
        self.problems: list[Problem] = []
        self.notes: dict[str, None] = {}
        """What the plan tells the user, in order, each once."""
        self.broken: dict[str, None] = {}
        """Lines about plugins that cannot be used, each once: they may explain several problems."""
        self.option_paths: dict[str, str] = {}
        """The absolute paths of the files that components' options name, by the places of the options in the recipe."""
        self.sizes: dict[str, int] = {}
        """How many records each data set has, by its place in the recipe."""
        self._data_sets: dict[tuple[str, Answer | None, Use], Path] = {}
        self._teachers: dict[Teacher, ModelSource | None] = {}
        own = recipe.model
        self.model = self._found(own.path, own.revision, own.dequantize, "model.path") or NO_MODEL
        self.recipe = self._with_precision()

    def _found(self, path: str, revision: str | None, dequantize: bool | None, place: str) -> ModelSource | None:
        """Return a model with what its modules say; None when it is a mistake, at `place` in the recipe."""
        try:
            found = find_model(path, self.recipe.resolve, revision, self.digests, dequantize)
            spec = dataclasses.replace(model_spec(self.recipe, found.path), dequantize=found.dequantize)
            found = dataclasses.replace(found, layout=self.describe(spec, found))
        except SqftError as error:
            self.report(place, str(error))
            return None
        self.collect(layout_checks.check_headers(found, place))
        return found

    def _with_precision(self) -> Recipe:
        """Return the recipe with the model's own precision in the place of "auto"; note where the default widens it."""
        recipe, stored = self.recipe, self.model.dtype or "float32"
        if recipe.model.dtype == "auto":
            return recipe.model_copy(update={"model": recipe.model.model_copy(update={"dtype": stored})})
        widened = recipe.model.dtype == "float32" != stored and self.model.quantization is None
        if widened and "dtype" not in recipe.model.model_fields_set:
            self.note(
                "model.dtype",
                f"the checkpoint is in {stored}; float32, the default, takes twice its memory and disk. Set this to "
                f'"auto" to keep {stored}, or write "float32" and this note goes away',
            )
        return recipe

    @property
    def has_model(self) -> bool:
        return self.model is not NO_MODEL

    @property
    def dtype(self) -> str:
        """The precision of the model."""
        return self.recipe.model.dtype

    def report(self, place: str, message: str) -> None:
        """Collect a problem, once: two sections may need the same file."""
        self.collect([Problem(place, message)])

    def collect(self, problems: Iterable[Problem]) -> None:
        """Collect the problems that a check yields, each once."""
        self.problems += [problem for problem in problems if problem not in self.problems]

    def note(self, place: str, message: str) -> None:
        """Collect something that the user should know and that hinders nothing, once."""
        self.notes[str(Problem(place, message))] = None

    def note_all(self, notes: Iterable[tuple[str, str]]) -> None:
        """Collect pairs of a place and what there is to say about it."""
        for place, message in notes:
            self.note(place, message)

    def component(self, kind: type[C], ref: ComponentRef, place: str) -> ResolvedComponent[C] | None:
        """Return the component that a recipe names, with its options validated against its own fields."""
        try:
            registration = self.registry.get(kind.kind, ref.name)
        except SqftError as error:
            reason, *broken = str(error).splitlines()
            self.report(place, reason)
            self.broken |= dict.fromkeys(broken)
            return None
        try:
            component = registration.component.model_validate(ref.options)
            return ResolvedComponent(registration, cast(C, self._with_paths(component, f"{place}.options")))
        except ValidationError as error:
            self.collect(problems_of(error, registration.component, f"{place}.options"))
        except (Exception, SystemExit) as error:  # a validator of the plugin's own
            self.report(f"{place}.options", f"{registration} raised {type(error).__name__}: {error}")
        return None

    def _with_paths(self, component: Component, place: str) -> Component:
        """Return a component whose options that name files have absolute paths; `place` is that of its options."""
        absolute: dict[str, str | Path] = {}
        for name, mark in input_paths(component).items():
            value = getattr(component, name)
            path = self.option_paths[f"{place}.{name}"] = str(self.file(str(value), f"{place}.{name}", mark.folder))
            absolute[name] = type(value)(path)
        return component.model_copy(update=absolute)

    def installed(self, kind: type[C]) -> list[type[C]]:
        """Return the installed components of a kind."""
        components = (registration.component for registration in self.registry.entries())
        return [component for component in components if issubclass(component, kind)]

    def files(
        self, section: Section, place: str, answers: Mapping[str, Answer | None] | None = None
    ) -> dict[str, Path]:
        """Return the files and folders that a section names, by role: their place in the section.

        Args:
            section: whose fields marked as `InputPath` are looked up.
            place: where the section is in the recipe.
            answers: by role, the part of a completion that every record must have.
        """
        files = {}
        for marked in fields_marked(type(section), InputPath, section.model_dump()):
            if marked.value is None:
                continue
            *parents, _ = marked.place
            owner, role = _part_at(section, parents), ".".join(marked.place)
            if isinstance(owner, Data):
                role = ".".join(parents)
                answer = (answers or {}).get(role)
                use: Use = "asked" if answer else getattr(section, "loss_on", "completion")
                use = "all" if isinstance(owner, CalibrationData) else use
                read = f"{place}.{role}", answer, use
                if read not in self._data_sets:  # sparsify and quantize have one calibration
                    self._data_sets[read] = self.records(owner, *read)
                files[role] = self._data_sets[read]
            elif isinstance(owner, Teacher):
                if teacher := self.teacher(owner, f"{place}.{'.'.join(parents)}"):
                    files[role] = teacher.path
            elif not marked.marker.hub:  # an adapter, which the planner of its section looks up
                files[role] = self.file(marked.value, f"{place}.{role}", marked.marker.folder)
        return files

    def teacher(self, teacher: Teacher, place: str) -> ModelSource | None:
        """Return the model that a recipe names as a teacher; None when it is a mistake."""
        if teacher.model == DENSE:
            return self.model if self.has_model else None
        if teacher not in self._teachers:
            self._teachers[teacher] = self._found(teacher.model, teacher.revision, None, f"{place}.model")
        return self._teachers[teacher]

    def file(self, path: str, place: str, folder: bool = False) -> Path:
        """Return the path of a file or folder, which must exist, be readable and not empty."""
        try:
            resolved = self.recipe.resolve(path)
        except SqftError as error:
            self.report(place, str(error))
            return Path(path)
        self.collect(data_sets.check_file(resolved, place, folder))
        return resolved

    @cached_property
    def conversations(self) -> ConversationCheck | None:
        """What tries conversations in the model's chat template; None when only its tokenizer knows that."""
        stored = stored_template(self.model.path) if self.has_model else None
        return ConversationCheck(stored) if stored else None

    def records(self, data: Data, place: str, answer: Answer | None = None, use: Use = "completion") -> Path:
        """Return the path of a data set, after reading every record of it, and trying its conversations.

        Args:
            data: the data set as the recipe describes it.
            place: where that is in the recipe.
            answer: the part of its completion that each record must have, to compare with; None when it needs none.
            use: what it is for.
        """
        path, problems = data_sets.find_data_set(data, place, self.recipe.resolve)
        plain = isinstance(data, CalibrationData) and is_plain_text(path)
        self.collect(problems or (data_sets.check_plain_text(data, path, place) if plain else ()))
        if problems or plain:
            return path
        try:
            records = records_of(path, data, self.recipe.model.chat_template_kwargs)
            self.sizes[place] = len(records)
            if any("messages" in record for record in records):
                for note in self.conversations.notes(records, use) if self.conversations else ():
                    self.note(place, note)
            for record in records:
                if answer and not extract_answer(completion_of(record), answer):
                    what = "completion" if answer == "text" else "number in the completion"
                    raise DataError(f"{record.location}: there is no {what} to compare with")
        except DataError as error:
            where = "path" if data.file is None else "file"
            self.report(f"{place}.{where}", str(error).replace("\n", "\n    "))
        return path

    def layers(self, include: Sequence[str], exclude: Sequence[str], place: str) -> list[LinearShape]:
        """Return the linear layers of the model that patterns choose to be compressed; narrow ones only by name."""
        layout = self.model.layout
        chosen = [layer for layer in layout.linears if selected(layer.name, include, exclude)]
        named = {name for name in layout.narrow if names_itself(name, include)}
        narrow = [layer.name for layer in chosen if layer.name in set(layout.narrow) - named]
        chosen = [layer for layer in chosen if layer.name not in narrow]
        if narrow:
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in narrow}))
            self.note(place, f"leaves out {len(narrow)} narrow layers ({kinds}: {NARROW}); name them to take them too")
        outside = list(layout_checks.check_inside(layout, include, place))
        self.collect(outside)
        if not (chosen or outside) and self.has_model:
            self.report(place, f"matches no linear layer of the model; it has {self._last_names()}")
        self.collect(layout_checks.check_own_weights(layout, chosen, place))
        return chosen

    def targets(self, patterns: Sequence[str], place: str) -> tuple[LinearShape, ...]:
        """Return the linear layers of the model that are adapted; each of the patterns must match one."""
        chosen = tuple(layer for layer in self.model.layout.linears if selected(layer.name, patterns, ()))
        outside = list(layout_checks.check_inside(self.model.layout, patterns, place))
        self.collect(outside)
        for index, pattern in enumerate(patterns if self.has_model else ()):
            if any(problem.place == f"{place}.{index}" for problem in outside):
                continue
            if not any(selected(layer.name, [pattern], ()) for layer in chosen):
                self.report(
                    f"{place}.{index}", f"'{pattern}' matches no linear layer; the model has {self._last_names()}"
                )
        self.collect(layout_checks.check_own_weights(self.model.layout, chosen, place))
        return chosen

    def _last_names(self) -> str:
        names = {layer.name.rpartition(".")[2] for layer in self.model.layout.linears}
        return ", ".join(sorted(names)) or "none in its decoder blocks, apart from routers"

    def within_window(self, section: S, field: str, place: str, always: bool = False) -> S:
        """Return the section with a number of tokens no larger than the model's window; one the user wrote must fit.

        Args:
            section: the section that holds the number.
            field: its key there.
            place: where the section is in the recipe.
            always: whether the default must fit too, instead of giving way.
        """
        window, tokens = self.model.size("max_position_embeddings"), getattr(section, field)
        if not window or tokens <= window:
            return section
        if always or field in section.model_fields_set:
            self.report(f"{place}.{field}", f"{tokens} tokens, but the model's window is {window}")
        return section.model_copy(update={field: window})


def _part_at(section: Section, place: Sequence[str]) -> Any:
    """Return what a section holds at a place inside it."""
    part: Any = section
    for key in place:
        part = part[int(key)] if isinstance(part, tuple) else getattr(part, key)
    return part
