"""The inputs of a stage: where it works, and the data it reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

from sqft.data.records import Record, records_of, repeated, split_off
from sqft.errors import DataError, StageError
from sqft.planning.plan import Plan, Step
from sqft.recipe.data import Data
from sqft.recipe.fields import Section
from sqft.recipe.sections import Finetune
from sqft.utils.digests import Digests
from sqft.utils.distributed import Processes
from sqft.utils.progress import Track, silent

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

S = TypeVar("S", bound=Section)

Report = dict[str, Any]
"""Numbers of a finished step, by name: they go into its manifest and the run's report."""


def section_of(step: Step, kind: type[S]) -> S:
    """Return a step's section of the recipe, as the type that its stage expects."""
    assert isinstance(step.section, kind)
    return step.section


@dataclass(frozen=True)
class StepData:
    """The data sets and texts of one step, checked against the digests that the plan took of them."""

    plan: Plan
    step: Step
    digests: Digests = field(default_factory=Digests)

    def of(self, name: str) -> StepData:
        """Return the data of another step of the plan."""
        return replace(self, step=self.plan.step(name))

    @property
    def seed(self) -> int:
        """The section's own seed where it has one, otherwise the recipe's."""
        own: int | None = getattr(self.step.section, "seed", None)
        return self.plan.recipe.seed if own is None else own

    def seed_for(self, *names: object) -> int:
        """Derive a seed of 63 bits for one use: a pure function of the step's seed and these names."""
        text = "/".join(map(str, (self.seed, *names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def file(self, role: str) -> Path:
        """Return one of the step's files or folders of data, after checking that it is what was planned.

        Raises:
            StageError: when it has changed: the result would be stored under the fingerprint of what it was.
        """
        path = self.step.files[role]
        if self.digests.path(path) != self.step.digests[role]:
            raise StageError(f"{self.step.stage}.{role}: {path} has changed since the plan; run again, to plan with it")
        return path

    @contextmanager
    def reading(self, role: str) -> Iterator[Path]:
        """Yield `file`, and check once more afterwards that it did not change while it was read."""
        yield self.file(role)
        self.file(role)

    def check_options(self) -> None:
        """Check that the files which components read by themselves, as their options say, are what was planned: those
        of this step, and those of `finetune` where its components run again.

        Raises:
            StageError: when one has changed.
        """
        for role in self.step.files_of_options():
            self.file(role)
        if "finetune" in self.step.inputs:
            self.of(self.step.inputs["finetune"]).check_options()

    def records(self, role: str, how: Data) -> list[Record]:
        """Read the records of one of the step's data sets."""
        with self.reading(role) as path:
            return records_of(path, how, self.plan.recipe.model.chat_template_kwargs)

    def training_sets(self) -> dict[str, tuple[list[Record], list[Record]]]:
        """Read `finetune`'s data sets: by role, the records to train on, repeated by weight, and those held out.

        Raises:
            DataError: when a data set is too small to hold anything out.
        """
        data, sets = self.of("finetune"), {}
        section = section_of(data.step, Finetune)
        for role, how in section.data_sets.items():
            # The recipe's seed, not the section's own: search and merge must get the same records.
            seed = self.plan.recipe.seed
            try:
                kept, held = split_off(data.records(role, how), section.holdout, seed)
                sets[role] = repeated(kept, how.weight, Random(f"{seed}/{role}")), held
            except DataError as error:
                raise DataError(f"finetune.{role}: {error}") from None
        return sets

    def training_records(self) -> tuple[list[Record], list[Record]]:
        """Read the records that `finetune` trains on and those it holds out, of all data sets together."""
        sets = self.training_sets().values()
        return [r for training, _ in sets for r in training], [r for _, held in sets for r in held]

    def calibration(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """Draw the step's calibration windows [samples, length]."""
        from sqft.data.windows import calibration_windows

        section = self.plan.recipe.calibration
        assert section is not None
        with self.reading("calibration") as file:
            seed, arguments = self.seed_for("calibration"), self.plan.recipe.model.chat_template_kwargs
            how = section.data
            return calibration_windows(file, tokenizer, section.samples, section.length, seed, how, arguments)


@dataclass(frozen=True)
class StageInputs:
    """What a stage is given.

    Args:
        plan: the plan of the run.
        step: the step to do.
        folders: the artifacts of earlier steps, by role.
        scratch: the folder to write to; it may hold files of an earlier attempt that was killed.
        device: where models run, as torch names it.
        track: the progress display.
        processes: this process among those that take part.
        digests: the digests of data that are known already.
    """

    plan: Plan
    step: Step
    folders: Mapping[str, Path]
    scratch: Path
    device: str
    track: Track = silent
    processes: Processes = field(default_factory=Processes)
    digests: Digests = field(default_factory=Digests)

    @cached_property
    def data(self) -> StepData:
        """The step's data."""
        return StepData(self.plan, self.step, self.digests)

    def seed_for(self, *names: object) -> int:
        """Derive a seed for one use. See `StepData.seed_for`."""
        return self.data.seed_for(*names)

    def section(self, kind: type[S]) -> S:
        """Return the step's section of the recipe."""
        return section_of(self.step, kind)

    def model_path(self) -> Path:
        """Return the path of the model this step works on: another step's, or the recipe's own."""
        base = self.folders.get("base")
        return base / "model" if base else self.plan.source.path
