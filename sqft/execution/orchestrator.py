"""The entry point from Python: plan a recipe, then for each step reuse its artifact or make it."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.components.attribution import blaming
from sqft.components.registry import Registry
from sqft.errors import Problem, RecipeError, StageError, StoreError
from sqft.execution import preflight
from sqft.execution.earlier_runs import remade_note
from sqft.execution.layouts import Layouts
from sqft.execution.log import log_to_file
from sqft.execution.measurements import made_of, take_earlier
from sqft.execution.memory import TOGETHER, alone_because
from sqft.execution.report import make_report
from sqft.execution.run import Outcome, Run
from sqft.execution.run_folder import make_run_folder, now, write_plan, write_report
from sqft.planning.plan import Plan, Step
from sqft.planning.planner import make_plan
from sqft.recipe.diagnostics import related
from sqft.recipe.recipe import Recipe
from sqft.store.artifacts import Artifact, Store
from sqft.utils.caches import use_writable_caches
from sqft.utils.distributed import Processes, processes
from sqft.utils.progress import Track, silent
from sqft.utils.resources import free_what_is_unused, peak_memory, versions
from sqft.utils.text import human_size

if TYPE_CHECKING:
    from sqft.stages.stage import Stage

log = logging.getLogger("sqft")
TAKE_PART, STORED = "take part", "stored"
"""Messages of the first process: all make this step together; the step's artifact is in the store."""


class Orchestrator:
    """Plans recipes against a registry and runs them in a store."""

    def __init__(
        self, registry: Registry, store: str | Path = "store", device: str = "cpu", track: Track = silent
    ) -> None:
        self.registry, self.store, self.track = registry, Store(store), track
        self.layouts = Layouts(self.store.root / "known-layouts")
        self.device = "cpu" if device == "cpu:0" else device
        use_writable_caches(self.store.root / "cache")

    @property
    def processes(self) -> Processes:
        """This process among those that run together. They meet when they are first asked for: a plan needs none."""
        return processes()

    def plan(self, recipe: Recipe) -> Plan:
        """Plan what a recipe will do here, and which of it is done already. Loads no model.

        Raises:
            RecipeError: with every mistake at once.
        """
        plan = make_plan(recipe, self.registry, self.store.digests, self.layouts)
        done = (step.name for step in plan.steps if self.store.is_complete(step.stage, step.fingerprint))
        return dataclasses.replace(plan, reused=frozenset(done))

    def load(self, recipe: str | Path | dict[str, Any], changes: Sequence[str] = ()) -> Plan:
        """Plan a recipe, which is a file or plain data, with changes ("sparsify.sparsity=0.6").

        Raises:
            RecipeError: with every mistake at once: the recipe's own, and those that only the registry,
                the model's headers and the files on disk bring to light.
        """
        try:
            read = Recipe.load(recipe, changes) if isinstance(recipe, str | Path) else Recipe.changed(recipe, changes)
        except RecipeError as error:
            raise RecipeError([*error.problems, *more_problems(error, self.plan)], error.source) from None
        return self.plan(read)

    def run(self, plan: Plan, until: str | None = None, fresh: str | None = None) -> Run:
        """Run a plan, reusing what the store has.

        `until` stops after a stage; `fresh` makes a stage and all steps that depend on it again.

        Raises:
            SqftError: when the user can fix something. Finished steps are kept, and a killed step resumes.
        """
        steps = steps_until(plan, until)
        anew = steps_from(plan, fresh) if fresh else []
        if self.processes.is_main:
            for step in anew:
                self.store.discard(step.stage, step.fingerprint)
        missing = [step for step in steps if not self.store.is_complete(step.stage, step.fingerprint)]
        preflight.check_run(plan, steps, missing, self.store, self.device, self.processes, self.plan)
        self.processes.assert_same(f"{plan.fingerprint} {until}", "plans another run than the first process")
        folder = make_run_folder(self.store, plan)
        self.layouts(plan.model_spec, plan.source)  # now that there is a store, the next plan finds it there
        if self.processes.is_main:
            write_plan(self.store, folder, plan)
        log_file, level = folder / "run.log", logging.INFO if self.processes.is_main else logging.ERROR
        components = [component.registration for step in plan.steps for component in step.components.values()]
        outcomes: dict[str, Outcome] = {}
        with blaming(components, log_file), log_to_file(log_file, self.store.writing, level), ExitStack() as used:
            started = now()
            if note := remade_note(self.store, plan.recipe, missing):
                log.info(note)
            for note in plan.notes:
                log.info("note: %s", note)
            for number, step in enumerate(steps, 1):
                inputs = {role: outcomes[name].folder for role, name in step.inputs.items()}
                label = f"[{number}/{len(steps)}] {step.name}"
                twins = (o.artifact for o in outcomes.values() if o.step.fingerprint == step.fingerprint)
                artifact = next(twins, None) or self._obtain(plan, step, inputs, label, used, step in anew)
                outcomes[step.name] = Outcome(step, artifact)
                self._notify("sqft_stage_finished", step=step, artifact=artifact)
            finished = finished_artifacts(self.store, plan, outcomes)
            report = make_report(plan, finished)
            if self.processes.is_main:
                write_report(self.store, Run(plan, folder, usable_outcomes(plan, finished), report), started)
        return Run(plan, folder, outcomes, report)

    def _obtain(
        self, plan: Plan, step: Step, inputs: Mapping[str, Path], label: str, used: ExitStack, anew: bool
    ) -> Artifact:
        """Return the step's artifact, made if need be; until `used` is closed, no other run can delete it.

        Args:
            plan: the step's.
            step: one step.
            inputs: the folders of earlier artifacts, by role.
            label: the step as the log shows it.
            used: holds the locks of what the run uses.
            anew: whether to measure everything, also what other evaluations have measured.
        """
        if not self.processes.is_main:
            return self._follow(plan, step, inputs)
        with self.store.begin(step.stage, step.fingerprint) as scratch:
            used.enter_context(self.store.using(step.stage, step.fingerprint))
            artifact = self.store.find(step.stage, step.fingerprint)
            if artifact:
                self.store.verify(artifact)
                log.info("%s: reused %s", label, artifact.folder.name)
            else:
                taken = take_earlier(self.store, step, scratch, inputs, self.device, anew)
                for name, earlier in taken.items():
                    log.info("%s: %s was measured earlier, in %s", label, name, earlier)
                artifact = self._make(plan, step, inputs, scratch, label)
            self.processes.broadcast(STORED)
            return artifact

    def _make(self, plan: Plan, step: Step, inputs: Mapping[str, Path], scratch: Path, label: str) -> Artifact:
        """Run the step's stage, verify what it wrote, and commit that."""
        from sqft.modeling.loading.transformers_io import quiet_transformers
        from sqft.stages.inputs import StepData

        log.info("%s", label)
        self._notify("sqft_stage_started", step=step)
        free_what_is_unused()  # the model of the step before, above all: a trainer's objects refer to one another
        together = self.processes if self._is_shared(plan, step) else Processes()
        stage = self._stage(plan, step, inputs, scratch, together)
        if together.count > 1:
            self.processes.broadcast(TAKE_PART)
        start = time.monotonic()
        with quiet_transformers(), peak_memory() as peak:
            report = stage.run()
            StepData(plan, step, self.store.digests).check_options()
            seconds = time.monotonic() - start
            stage.verify()
        manifest = {
            "stage": step.stage,
            "step": step.name,
            "fingerprint": step.fingerprint,
            "inputs": {role: plan.step(name).fingerprint for role, name in step.inputs.items()},
            "components": {kind: component.identity for kind, component in step.components.items()},
            "versions": versions(),
            "device": self.device,
            "processes": together.count,
            "seconds": seconds,
            "verify_seconds": time.monotonic() - start - seconds,
            "peak_memory": peak[0],
            "report": report,
            **({"measurements": dict(step.measurements), "made_of": made_of(inputs)} if step.measurements else {}),
        }
        artifact = self.store.commit(scratch, manifest)
        log.info("%s: done in %.0f s, peak %s", label, seconds, human_size(peak[0]))
        return artifact

    def _is_shared(self, plan: Plan, step: Step) -> bool:
        """Decide whether all processes make a step together; if not, the first one makes it alone."""
        if step.stage in TOGETHER:
            return True
        if self.processes.count == 1 or "calibration" not in step.files or plan.recipe.calibration is None:
            return False
        reason = alone_because(step, plan.recipe.calibration.samples, self.processes)
        if reason:
            log.info("%s: made by the first process alone: %s", step.name, reason)
        return reason is None

    def _follow(self, plan: Plan, step: Step, inputs: Mapping[str, Path]) -> Artifact:
        """Take part in the step if all processes do; return its artifact once the first process has stored it."""
        if self.processes.receive() == TAKE_PART:
            from sqft.modeling.loading.transformers_io import quiet_transformers

            with quiet_transformers():
                scratch = self.store.partial(step.stage, step.fingerprint)
                self._stage(plan, step, inputs, scratch, self.processes).run()
            self.processes.receive()
        artifact = self.store.find(step.stage, step.fingerprint)
        if artifact is None:
            raise StoreError(
                f"process {self.processes.rank} does not see what the first one stored in {self.store.root}; "
                "all processes need the same store"
            )
        return artifact

    def _stage(self, plan: Plan, step: Step, inputs: Mapping[str, Path], scratch: Path, together: Processes) -> Stage:
        """Make a step's stage, for the processes that make it together; its module is imported only now."""
        from sqft.stages.inputs import StageInputs
        from sqft.stages.stage import make_stage

        track = self.track if self.processes.is_main else silent
        given = StageInputs(plan, step, inputs, scratch, self.device, track, together, self.store.digests)
        return make_stage(given)

    def _notify(self, hook: str, **arguments: object) -> None:
        for plugin, error in self.registry.notify(hook, **arguments):
            log.warning("plugin '%s' raised in %s: %s: %s", plugin, hook, type(error).__name__, error)


def more_problems(error: RecipeError, plan: Callable[[Recipe], Plan]) -> list[Problem]:
    """Plan the valid rest of a faulty recipe, and return the problems that are not near the known ones."""
    if error.rest is None:
        return []
    try:
        plan(error.rest)
    except RecipeError as more:
        known = [problem.place for problem in error.problems]
        return [p for p in more.problems if not (p.place and any(related(p.place, place) for place in known))]
    return []


def finished_artifacts(store: Store, plan: Plan, outcomes: Mapping[str, Outcome]) -> dict[str, Artifact]:
    """Return all finished artifacts of a plan by step: of a run, and of steps beyond it that were made before."""
    later = [
        step for step in plan.steps if step.name not in outcomes and store.is_complete(step.stage, step.fingerprint)
    ]
    earlier = {step.name: store.find(step.stage, step.fingerprint) for step in later}
    made = {name: outcome.artifact for name, outcome in outcomes.items()}
    return made | {name: artifact for name, artifact in earlier.items() if artifact}


def usable_outcomes(plan: Plan, finished: Mapping[str, Artifact]) -> dict[str, Outcome]:
    """Return the outcomes of those steps whose inputs are there too, by step: without them nothing can be loaded."""
    usable: dict[str, Outcome] = {}
    for step in plan.steps:
        if step.name in finished and usable.keys() >= set(step.inputs.values()):
            usable[step.name] = Outcome(step, finished[step.name])
    return usable


def steps_until(plan: Plan, stage: str | None) -> list[Step]:
    """Return a plan's steps up to the last one of a stage, or to the step of that name; all without one.

    Raises:
        StageError: when the plan has no such stage or step.
    """
    if stage is None:
        return list(plan.steps)
    _check_stage(plan, stage)
    last = max(index for index, step in enumerate(plan.steps) if stage in (step.stage, step.name))
    return list(plan.steps[: last + 1])


def steps_from(plan: Plan, stage: str) -> list[Step]:
    """Return the steps of a stage, or the step of that name, and every step that depends on them.

    Raises:
        StageError: when the plan has no such stage or step.
    """
    _check_stage(plan, stage)
    names: set[str] = set()
    for step in plan.steps:
        if stage in (step.stage, step.name) or names & set(step.inputs.values()):
            names.add(step.name)
    return [step for step in plan.steps if step.name in names]


def _check_stage(plan: Plan, name: str) -> None:
    known = {step.stage for step in plan.steps} | {step.name for step in plan.steps}
    if name not in known:
        raise StageError(f"this recipe has no stage '{name}'; it has {', '.join(sorted(known))}")
