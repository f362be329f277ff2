"""What a stage is given, and how it opens its inputs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TypeVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sqft.components.kinds import Component
from sqft.data.records import Record, records_of, repeated, split_off
from sqft.data.windows import calibration_windows
from sqft.errors import DataError, StageError
from sqft.modeling.calibration.walk import walk
from sqft.planning.plan import Plan, Step
from sqft.recipe.data import Data
from sqft.recipe.sections import Finetune
from sqft.stages.adapted import Base
from sqft.types import LinearStats, Statistic
from sqft.utils.digests import Digests
from sqft.utils.distributed import Processes
from sqft.utils.progress import Track

log = logging.getLogger("sqft")


C = TypeVar("C", bound=Component)


@dataclass(frozen=True)
class Context:
    """One step's surroundings. `folder` is its scratch folder; it may hold what an earlier try left."""

    plan: Plan
    step: Step
    inputs: Mapping[str, Path]
    folder: Path
    device: str
    track: Track
    processes: Processes
    digests: Digests = field(default_factory=Digests)

    @property
    def seed(self) -> int:
        own: int | None = getattr(self.step.section, "seed", None)
        return self.plan.recipe.seed if own is None else own

    def seed_for(self, *names: object) -> int:
        """A seed of 63 bits for one use: a pure function of the recipe's seed and these names."""
        text = "/".join(map(str, (self.seed, *names)))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def component(self, kind: type[C], step: Step | None = None) -> C:
        """This step's component of a kind (or another step's)."""
        return cast(C, (step or self.step).components[kind.kind].component)

    def label(self, kind: type[Component], step: Step | None = None) -> str:
        """That component as error messages name it."""
        return str((step or self.step).components[kind.kind].registration)

    def model_folder(self) -> Path | None:
        """The folder of the base model this step works on; None means the recipe's own model."""
        base = self.inputs.get("base")
        return base / "model" if base else None

    def base(self) -> Base:
        """What lies under the adapters of this step."""
        return Base.of(self.plan, self.inputs)

    def file(self, role: str, step: Step | None = None) -> Path:
        """One of this step's files or folders of data (or another step's), which is what it was when it was planned.

        Raises:
            StageError: when it has changed: the result would be stored under the fingerprint of what it was.
        """
        step = step or self.step
        path = step.files[role]
        if self.digests.path(path) != step.digests[role]:
            raise StageError(f"{step.stage}.{role}: {path} has changed since the plan; run again, to plan with it")
        return path

    @contextmanager
    def reading(self, role: str, step: Step | None = None) -> Iterator[Path]:
        """`file`, which does not change inside either."""
        yield self.file(role, step)
        self.file(role, step)

    def records(self, role: str, how: Data, step: Step | None = None) -> list[Record]:
        """The records of one of this step's data sets (or another step's)."""
        with self.reading(role, step) as path:
            return records_of(path, how)

    def training_sets(self) -> dict[str, tuple[list[Record], list[Record]]]:
        """Of each data set by its role: what `finetune` trains on, as often as its weight says, and what is held out.

        Raises:
            DataError: when a data set is too small to hold anything out.
        """
        step, found = self.plan.step("finetune"), {}
        section = cast(Finetune, step.section)
        for role, data in section.data_sets.items():
            # The recipe's seed, not a step's own: search and merge ask for the same records.
            seed = self.plan.recipe.seed
            try:
                kept, out = split_off(self.records(role, data, step), section.holdout, seed)
                found[role] = repeated(kept, data.weight, Random(f"{seed}/{role}")), out
            except DataError as error:
                raise DataError(f"finetune.{role}: {error}") from None
        return found

    def training_records(self) -> tuple[list[Record], list[Record]]:
        """What `finetune` trains on, and what it holds out, of all data sets together. See `training_sets`."""
        sets = self.training_sets().values()
        return [r for training, _ in sets for r in training], [r for _, held in sets for r in held]

    def calibration(self, tokenizer: PreTrainedTokenizerBase) -> Tensor:
        """This step's calibration windows [samples, length]."""
        section = self.plan.recipe.calibration
        assert section is not None
        with self.reading("calibration") as file:
            seed = self.seed_for("calibration")
            return calibration_windows(file, tokenizer, section.samples, section.length, seed)

    def run_calibration(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layers: Mapping[str, nn.Linear],
        needs: frozenset[Statistic],
        compress: Callable[[str, nn.Linear, LinearStats], None],
        label: str,
        sequential: bool = False,
    ) -> int:
        """Call `compress` on each layer with the statistics it needs; how many calibration tokens that took."""
        if not needs:
            for name, linear in self.track(layers.items(), label, len(layers)):
                compress(name, linear, LinearStats(tokens=0))
            return 0
        windows = self.calibration(tokenizer)
        walk(model, windows, set(layers), needs, compress, self.device, self.track, sequential)
        return windows.numel()
