"""Whether a run fits into memory, and which settings would make it fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from sqft.errors import RecipeError
from sqft.planning.plan import Plan, Step
from sqft.planning.planner import with_changes
from sqft.recipe import Recipe
from sqft.recipe.sections import Calibration, Finetune, Quantize, Sparsify
from sqft.utils.distributed import Processes
from sqft.utils.resources import free_memory
from sqft.utils.text import human_size

TOLERANCE = 0.8
"""Estimates may be too high by a fifth: what would not fit even then is refused."""
TOGETHER = ("finetune", "search")
"""Stages that all processes of a run always make together."""
ON_DEVICE = ("finetune", "search", "evaluate")
"""Stages that hold the model on the device."""

Replan = Callable[[Recipe], Plan]


@dataclass(frozen=True)
class Shortage:
    """A step that needs more memory than there is; `message` says so, and which settings need less."""

    message: str
    hopeless: bool
    """Whether it would not fit even if the estimate were a fifth too high."""


def shortage_of(plan: Plan, missing: Iterable[str], device: str, replan: Replan) -> Shortage | None:
    """Return what is short for the steps of a plan that are to be made; None when all of them fit.

    Memory is the machine's, or its container's. On another device than the CPU, steps that hold the model there are not
    looked at.

    Args:
        plan: the plan.
        missing: the names of those steps.
        device: where models run, as torch names it.
        replan: plans a changed recipe.
    """
    free, names = free_memory(), set(missing)
    steps = [step for step in plan.steps if step.name in names and (device == "cpu" or step.stage not in ON_DEVICE)]
    step = max(steps, key=_needed, default=None)
    if step is None or _needed(step) <= free:
        return None
    need = f"{step.name} needs about {human_size(_needed(step))} of memory, and {human_size(free)} are free"
    less, needed = _less(plan, step, free, replan)
    other = "free some memory, or use a larger machine"
    remedy = less if less and needed <= free else f"even {less}: {other}" if less else other
    return Shortage(f"{need}; {remedy}", _hopeless(step, free))


def shortage_of_processes(plan: Plan, missing: Iterable[Step], processes: Processes, replan: Replan) -> Shortage | None:
    """Return what is short for the steps among `missing` that all processes make together on the CPU, each with its own
    model and its share of the batch; None when all of them fit. See `shortage_of`."""

    def replan_share(recipe: Recipe) -> Plan:
        rows = -(-recipe.finetune.batch_size // processes.count) if recipe.finetune else 0
        return replan(with_changes(recipe, [f"finetune.batch_size={rows}"]) if rows else recipe)

    names = {step.name for step in missing if step.stage in TOGETHER}
    steps = [step for step in replan_share(plan.recipe).steps if step.name in names] if names else []
    free, step = free_memory(processes.here), max(steps, key=_needed, default=None)
    if step is None or processes.here * _needed(step) <= free:
        return None
    need = f"{step.name} needs about {human_size(_needed(step))} of memory in each of {processes.here} processes"
    less, needed = _less(plan, step, free // processes.here, replan_share)
    remedy = f", or in each {less}" if less and needed <= free // processes.here else ""
    message = f"{need}, and {human_size(free)} are free; start fewer processes{remedy}"
    return Shortage(message, _hopeless(step, free // processes.here))


def alone_because(step: Step, windows: int, processes: Processes) -> str | None:
    """Return why the first process should calibrate a step alone; None where all processes can share its windows.

    Args:
        step: one that calibrates.
        windows: how many windows it has.
        processes: those of the run.
    """
    if windows < processes.count:
        return f"calibration.samples of {windows} is too few for {processes.count} processes"
    if processes.here * _needed(step) > (free := free_memory(processes.here)):
        need = f"{processes.here} processes would need {human_size(_needed(step))} each"
        return f"{need}, and {human_size(free)} are free"
    return None


def _needed(step: Step) -> int:
    return step.estimate.memory


def _hopeless(step: Step, free: int) -> bool:
    return TOLERANCE * _needed(step) > free


def _less(plan: Plan, step: Step, free: int, replan: Replan) -> tuple[str, int]:
    """Say which settings need less, and how much; nothing where none does. Return it with the bytes."""
    changes, needed = _smaller(plan, step, free, replan)
    settings = " ".join(f"--set {change}" for change in changes)
    if "model.dtype=bfloat16" in changes:
        settings += ", which changes all numbers a little,"
    return f"{settings} would need about {human_size(needed)}" if changes else "", needed


def _smaller(plan: Plan, step: Step, free: int, replan: Replan) -> tuple[list[str], int]:
    """Return changes of the plan's recipe with which a step fits into `free` bytes, as few as that takes, and what it
    needs then; or all that help."""
    kept: list[str] = []
    needed = _needed(step)
    for changes in _remedies(plan.step(step.name), plan.recipe.calibration):
        if needed <= free:
            break
        try:
            tried = _needed(replan(with_changes(plan.recipe, [*kept, *changes])).step(step.name))
        except RecipeError:  # this recipe, or this model, cannot have it
            continue
        if tried < needed:
            # A batch that is halved once more takes the place of the one before.
            kept = [change for change in kept if _field(change) not in map(_field, changes)] + list(changes)
            needed = tried
    return kept, needed


def _remedies(step: Step, calibration: Calibration | None) -> Iterator[tuple[str, ...]]:
    """Yield settings that may need less memory, those first that change the result least."""
    section = step.section
    if isinstance(section, Finetune):
        yield ("finetune.gradient_checkpointing=true",)
        yield ("finetune.loss_chunk=128",)
        if section.base == "floats":
            yield ("finetune.base=packed",)
        rows, batches = section.batch_size, section.gradient_accumulation
        while rows % 2 == 0:
            rows, batches = rows // 2, 2 * batches
            yield f"finetune.batch_size={rows}", f"finetune.gradient_accumulation={batches}"
    if isinstance(section, Sparsify | Quantize) and calibration and calibration.memory > 0.25:
        yield ("calibration.memory=0.25",)
    yield ("model.dtype=bfloat16",)


def _field(change: str) -> str:
    return change.partition("=")[0]
