"""The door from Python: plan a recipe, then for each step reuse its artifact or make it."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.components.attribution import blaming
from sqft.components.registry import Registry
from sqft.errors import ArtifactError, Problem, RecipeError, StageError
from sqft.execution.log import logged
from sqft.execution.report import make_report, report_markdown
from sqft.planning.plan import Plan, Step
from sqft.planning.planner import make_plan
from sqft.recipe.diagnostics import related
from sqft.recipe.recipe import Recipe
from sqft.recipe.rerun import with_absolute_paths
from sqft.recipe.sections import Finetune
from sqft.store.artifacts import Artifact, Store
from sqft.utils.distributed import processes
from sqft.utils.files import write_json
from sqft.utils.progress import Track, silent
from sqft.utils.text import human

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from sqft.stages.stage import Stage
from sqft.utils.resources import peak_memory, versions

log = logging.getLogger("sqft")


TOGETHER = ("finetune",)
"""Stages that all processes of a run make together; the first one makes the others."""


@dataclass(frozen=True)
class Outcome:
    """A step and the artifact it left."""

    step: Step
    artifact: Artifact

    @property
    def report(self) -> dict[str, Any]:
        return self.artifact.report

    @property
    def folder(self) -> Path:
        return self.artifact.folder

    def load_model(self) -> PreTrainedModel:
        """The model this step wrote.

        Raises:
            StageError: when the step wrote none (an adapter, a choice, a measurement).
        """
        from sqft.checkpoints.model_spec import ModelSpec
        from sqft.modeling.loading import load_model

        if not (self.folder / "model").is_dir():
            raise StageError(f"step '{self.step.name}' holds no model; sparsify, quantize, merge and export do")
        return load_model(ModelSpec(self.folder / "model"))[0]


@dataclass(frozen=True)
class Run(Mapping[str, Outcome]):
    """What a run left, by step: `run["merge"].load_model()`."""

    plan: Plan
    folder: Path
    outcomes: dict[str, Outcome]
    report: dict[str, Any]

    def __getitem__(self, name: str) -> Outcome:
        return self.outcomes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def result(self) -> Path | None:
        """The folder a user came for: exported, merged, adapter, or sparse model; the last there is.

        None when the last step that was taken leaves nothing to load: after `finetune` alone, no ranks are chosen.
        """
        made = [outcome for outcome in self.outcomes.values() if outcome.step.stage != "evaluate"]
        places = [made[-1].folder / name for name in ("model", "adapter")] if made else []
        return next(filter(Path.is_dir, places), None)

    def inputs(self, step: str) -> dict[str, Path]:
        """Return the artifact folders of a step's inputs, by role."""
        return {role: self[name].folder for role, name in self.plan.step(step).inputs.items()}


class Orchestrator:
    """Plans recipes against a registry and runs them in a store."""

    def __init__(
        self,
        registry: Registry,
        store: str | Path = "store",
        device: str = "cpu",
        track: Track = silent,
    ) -> None:
        self.registry, self.store, self.device, self.track = (
            registry,
            Store(store),
            "cpu" if device == "cpu:0" else device,
            track,
        )
        self.processes = processes()

    def plan(self, recipe: Recipe) -> Plan:
        """What a recipe will do here, and which of it is done already. Loads no model.

        Raises:
            RecipeError: with every mistake at once.
        """
        plan = make_plan(recipe, self.registry, self.store.digests)
        return dataclasses.replace(plan, reused=frozenset(step.name for step in plan.steps if self._is_done(step)))

    def load(self, path: str | Path, changes: Sequence[str] = ()) -> Plan:
        """Read a recipe file with changes ("sparsify.sparsity=0.6") and plan it.

        Raises:
            RecipeError: with every mistake at once: the recipe's own, and those that only the registry,
                the model's headers and the files on disk bring to light.
        """
        try:
            recipe = Recipe.load(path, changes)
        except RecipeError as error:
            raise RecipeError([*error.problems, *self._more(error)], error.source) from None
        return self.plan(recipe)

    def _more(self, error: RecipeError) -> list[Problem]:
        """What planning the rest of a faulty recipe finds, away from the mistakes that are known."""
        if error.rest is None:
            return []
        try:
            self.plan(error.rest)
        except RecipeError as more:
            known = [problem.place for problem in error.problems]
            return [p for p in more.problems if not (p.place and any(related(p.place, place) for place in known))]
        return []

    def _is_done(self, step: Step) -> bool:
        """Whether the store has a step's artifact whole. A damaged one is `run`'s to report, or to make afresh."""
        try:
            return self.store.find(step.stage, step.fingerprint) is not None
        except ArtifactError:
            return False

    def run(self, plan: Plan, until: str | None = None, fresh: str | None = None) -> Run:
        """Run a plan, reusing what the store has.

        `until` stops after a stage; `fresh` makes a stage and all that follows from it again.

        Raises:
            SqftError: when something is the user's to mend. Finished steps stay, a killed one resumes.
        """
        steps = self._until(plan, until)
        if self.processes.is_main:
            if fresh:
                self._discard(plan, fresh)
            self._check_disk(steps)
            self._check_model(plan, steps)
        self._check_device()
        self._check_training(steps)
        self.processes.assert_same(f"{plan.fingerprint} {until}", "plans another run than the first process")
        folder = self._run_folder(plan)
        outcomes: dict[str, Outcome] = {}
        entries = [part.registration for step in plan.steps for part in step.components.values()]
        log_file = folder / "run.log"
        with blaming(entries, log_file), logged(log_file, self.store.writing), ExitStack() as used:
            started = datetime.now(UTC).isoformat(timespec="seconds")
            for number, step in enumerate(steps, 1):
                inputs = {role: outcomes[name].folder for role, name in step.inputs.items()}
                label = f"[{number}/{len(steps)}] {step.name}"
                twins = (o.artifact for o in outcomes.values() if o.step.fingerprint == step.fingerprint)
                artifact = next(twins, None) or self._obtain(plan, step, inputs, label, used)
                outcomes[step.name] = Outcome(step, artifact)
                self._notify("sqft_stage_finished", step=step, artifact=artifact)
            report = make_report(plan, self._standing(plan, outcomes))
            if self.processes.is_main:
                self._write_report(folder, report, outcomes, started)
        return Run(plan, folder, outcomes, report)

    def _write_report(self, folder: Path, report: dict[str, Any], outcomes: dict[str, Outcome], started: str) -> None:
        links = {name: f"../../artifacts/{outcome.folder.name}" for name, outcome in outcomes.items()}
        finished = datetime.now(UTC).isoformat(timespec="seconds")
        with self.store.writing():
            write_json(folder / "report.json", report)
            (folder / "report.md").write_text(report_markdown(report), "utf-8")
            content = {"started": started, "finished": finished, "versions": versions(), "artifacts": links}
            write_json(folder / "run.json", content)

    def _standing(self, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Artifact]:
        """Every artifact of the plan that stands, those of steps beyond `until` too."""
        later = {step.name: step for step in plan.steps if step.name not in outcomes and self._is_done(step)}
        found = {name: self.store.find(step.stage, step.fingerprint) for name, step in later.items()}
        made = {name: outcome.artifact for name, outcome in outcomes.items()}
        return made | {name: artifact for name, artifact in found.items() if artifact}

    def _obtain(self, plan: Plan, step: Step, inputs: Mapping[str, Path], label: str, used: ExitStack) -> Artifact:
        """The step's artifact: found, or made, proved and committed; nobody forgets it while `used` is open."""
        if not self.processes.is_main:
            return self._follow(plan, step, inputs)
        with self.store.begin(step.stage, step.fingerprint) as scratch:
            used.enter_context(self.store.using(step.stage, step.fingerprint))
            found = self.store.find(step.stage, step.fingerprint)
            if found:
                self.store.verify(found)
                log.info("%s: reused %s", label, found.folder.name)
                self.processes.broadcast("stands")
                return found
            log.info("%s", label)
            self._notify("sqft_stage_started", step=step)
            stage = self._stage(plan, step, inputs, scratch)
            if step.stage in TOGETHER:
                self.processes.broadcast("together")
            start = time.monotonic()
            with peak_memory() as peak:
                report = stage.run()
            seconds = time.monotonic() - start
            stage.verify()
            proof = time.monotonic() - start - seconds
            artifact = self.store.commit(
                scratch,
                {
                    "stage": step.stage,
                    "step": step.name,
                    "fingerprint": step.fingerprint,
                    "inputs": {role: plan.step(name).fingerprint for role, name in step.inputs.items()},
                    "components": {kind: part.identity for kind, part in step.components.items()},
                    "versions": versions(),
                    "device": self.device,
                    "processes": self.processes.count if step.stage in TOGETHER else 1,
                    "seconds": seconds,
                    "proof_seconds": proof,
                    "peak_memory": peak[0],
                    "report": report,
                },
            )
            log.info("%s: done in %.0f s, peak %s", label, seconds, human(peak[0]))
            self.processes.broadcast("stands")
            return artifact

    def _follow(self, plan: Plan, step: Step, inputs: Mapping[str, Path]) -> Artifact:
        """Take part in the step if all make it together; its artifact once the first process says that it stands."""
        if self.processes.receive() == "together":
            stage = self._stage(plan, step, inputs, self.store.partial(step.stage, step.fingerprint))
            stage.run()
            self.processes.receive()
        found = self.store.find(step.stage, step.fingerprint)
        if found is None:
            raise StageError(
                f"process {self.processes.rank} does not see what the first one stored in {self.store.root}; "
                "all processes need the same store"
            )
        return found

    def _stage(self, plan: Plan, step: Step, inputs: Mapping[str, Path], scratch: Path) -> Stage:
        """Make a step's stage; its module is imported only now."""
        from sqft.stages.inputs import StageInputs
        from sqft.stages.stage import STAGES

        track = self.track if self.processes.is_main else silent
        given = StageInputs(plan, step, inputs, scratch, self.device, track, self.processes, self.store.digests)
        return STAGES[step.stage](given)

    def _until(self, plan: Plan, until: str | None) -> list[Step]:
        if until is None:
            return list(plan.steps)
        self._check_stage(plan, until)
        last = max(index for index, step in enumerate(plan.steps) if until in (step.stage, step.name))
        return list(plan.steps[: last + 1])

    def _discard(self, plan: Plan, fresh: str) -> None:
        """Forget a stage's artifacts and those of every step that builds on them."""
        self._check_stage(plan, fresh)
        stale: set[str] = set()
        for step in plan.steps:
            if fresh in (step.stage, step.name) or stale & set(step.inputs.values()):
                stale.add(step.name)
                self.store.discard(step.stage, step.fingerprint)

    def _check_stage(self, plan: Plan, name: str) -> None:
        known = {step.stage for step in plan.steps} | {step.name for step in plan.steps}
        if name not in known:
            raise StageError(f"this recipe has no stage '{name}'; it has {', '.join(sorted(known))}")

    def _check_disk(self, steps: list[Step]) -> None:
        missing = [step for step in steps if self.store.find(step.stage, step.fingerprint) is None]
        needed = sum(step.estimate.storage for step in missing)
        place = next(
            parent for parent in (self.store.root.resolve(), *self.store.root.resolve().parents) if parent.exists()
        )
        free = shutil.disk_usage(place).free
        if needed > free:
            raise StageError(
                f"the store {self.store.root} needs about {human(needed)} and {place} has {human(free)} free; "
                "make room, or name another store with --store"
            )

    def _check_device(self) -> None:
        if self.device == "cpu":
            return
        import torch

        try:
            if torch.device(self.device).type == "meta":
                raise StageError("device 'meta' holds no numbers; name cpu or cuda")
            several = torch.cuda.device_count() > 1 or torch.device(self.device).index
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            raise StageError(f"device '{self.device}' cannot be used: {str(error).splitlines()[0]}") from None
        if several:
            raise StageError(
                f"device '{self.device}': Trainer takes every GPU it sees; set CUDA_VISIBLE_DEVICES to the one that is "
                "meant (`sqft run --device cuda:1` does so) and name it cuda"
            )

    def _check_training(self, steps: list[Step]) -> None:
        """What training needs of the device and of the processes, before anything is made."""
        for step in steps:
            if not isinstance(step.section, Finetune) or self._is_done(step):
                continue
            if self.device == "cpu" and step.section.precision == "float16":
                raise StageError(
                    "finetune.precision: float16 loses small gradients unless the loss is scaled, which needs an "
                    "accelerator; on the CPU use bfloat16 or float32"
                )
            if (batch := step.section.batch_size) < self.processes.count:
                raise StageError(
                    f"finetune.batch_size: {batch} examples are too few for {self.processes.count} processes, "
                    "which share them; raise it, or start fewer processes"
                )

    def _check_model(self, plan: Plan, steps: list[Step]) -> None:
        """Hold the plan against the model's own modules, when there is anything left to do."""
        if not all(map(self._is_done, steps)):
            from sqft.stages.preflight import check_fit

            check_fit(plan)

    def _run_folder(self, plan: Plan) -> Path:
        """`runs/NAME-xxxxxxxx`: another recipe of the same name has another fingerprint, and so a folder."""
        folder = self.store.runs / f"{plan.recipe.name}-{plan.fingerprint[:8]}"
        with self.store.writing():
            folder.mkdir(parents=True, exist_ok=True)
            if not self.processes.is_main:
                return folder
            write_json(folder / "recipe.json", with_absolute_paths(plan.recipe))
            write_json(folder / "plan.json", [_step_json(step) for step in plan.steps])
        return folder

    def _notify(self, hook: str, **arguments: object) -> None:
        for plugin, error in self.registry.notify(hook, **arguments):
            log.warning("plugin '%s' raised in %s: %s: %s", plugin, hook, type(error).__name__, error)


def _step_json(step: Step) -> dict[str, Any]:
    return {
        "name": step.name,
        "fingerprint": step.fingerprint,
        "inputs": dict(step.inputs),
        "components": {kind: part.identity for kind, part in step.components.items()},
        "estimate": dataclasses.asdict(step.estimate),
    }
