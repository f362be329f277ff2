"""Checks before a run makes anything: room on the disk, the device, what training needs, the model's own modules."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterable, Sequence

from sqft.errors import DeviceError, StoreError
from sqft.execution.memory import TOGETHER, Replan, shortage_of, shortage_of_processes
from sqft.planning.plan import Plan, Step
from sqft.recipe.sections import Evaluate, Finetune
from sqft.store.artifacts import Store
from sqft.utils.distributed import Processes
from sqft.utils.files import existing_parent, size_of, unwritable
from sqft.utils.text import human_size

log = logging.getLogger("sqft")
IGNORE_MEMORY = "SQFT_IGNORE_MEMORY"
"""Environment variable: set to 1, what needs more memory than there is runs all the same."""


def check_run(
    plan: Plan,
    steps: Sequence[Step],
    missing: Sequence[Step],
    store: Store,
    device: str,
    processes: Processes,
    replan: Replan,
) -> None:
    """Check that steps of a plan can be run here, before anything is made.

    Args:
        plan: the whole plan.
        steps: those of its steps that are to be run.
        missing: those of them that the store does not have.
        store: where artifacts go.
        device: the torch device to work on.
        processes: the processes of the run; the first one checks disk, memory and the model for all.
        replan: plans a changed recipe, to find settings that would fit.

    Raises:
        SqftError: when the disk, the memory, the device, the training settings, the model or a task's data set do not
            allow it.
    """
    if processes.is_main:
        check_disk(store, steps)
        check_memory(plan, missing, device, processes, replan)
        if missing:
            check_model(plan, missing)
            check_tasks(plan, missing)
    check_device(device)
    check_training(missing, device, processes.count)


def check_disk(store: Store, steps: Iterable[Step]) -> None:
    """Check that the store's disk has room for what the steps that are not done will write.

    Raises:
        StoreError: with the room that is needed and the room that is free.
    """
    if shortage := disk_shortage(store, [step for step in steps if store.find(step.stage, step.fingerprint) is None]):
        raise StoreError(shortage)


def disk_shortage(store: Store, steps: Iterable[Step]) -> str | None:
    """Return what is short for what steps that are to be made will write to the store's disk; None if nothing is."""
    needed = sum(max(0, step.estimate.storage - _begun(store, step)) for step in steps)
    folder = existing_parent(store.root)
    free = shutil.disk_usage(folder).free
    if needed <= free:
        return None
    return (
        f"the store {store.root} needs about {human_size(needed)} and {folder} has {human_size(free)} free; "
        "make room, or name another store with --store"
    )


def unusable(store: Store) -> str | None:
    """Return why nothing can be written to a store, for a plan, which writes nothing; None if it can."""
    why = unwritable(store.artifacts) or unwritable(store.runs)
    return why and f"the store {store.root} cannot be made or used: {why}; name another with --store"


def _begun(store: Store, step: Step) -> int:
    """Return the bytes that an attempt before has written of a step: it goes on from there, or they are deleted."""
    if step.stage == "finetune":  # these are checkpoints, which the estimate does not count
        return 0
    try:
        return size_of(store.partial(step.stage, step.fingerprint))
    except OSError:  # another run is writing there
        return 0


def check_memory(plan: Plan, missing: Sequence[Step], device: str, processes: Processes, replan: Replan) -> None:
    """Check that there is memory for the steps that are not done; warn where it is close.

    Args:
        plan: the whole plan.
        missing: those of its steps.
        device: the torch device to work on.
        processes: those of the run; on the CPU, they are counted together.
        replan: plans a changed recipe.

    Raises:
        DeviceError: with the memory that is needed, what is free, and settings, or fewer processes, that need less.
    """
    several = processes.count > 1 and device == "cpu"
    names = [step.name for step in missing if not (several and step.stage in TOGETHER)]
    found = [shortage_of(plan, names, device, replan)]
    if several:
        found.append(shortage_of_processes(plan, missing, processes, replan))
    shortage = max((one for one in found if one), key=lambda one: one.hopeless, default=None)
    if shortage is None:
        return
    if shortage.hopeless and os.environ.get(IGNORE_MEMORY, "0") in ("", "0"):
        raise DeviceError(f"{shortage.message}; {IGNORE_MEMORY}=1 in the environment runs it all the same")
    log.warning("%s", shortage.message)


def check_device(device: str) -> None:
    """Check that torch can use a device ("cpu", "cuda", …), and that Trainer will use no other GPU.

    Raises:
        DeviceError: when it cannot be used, or several GPUs are visible.
    """
    if device == "cpu":
        return
    import torch

    try:
        named = torch.device(device)
        if named.type == "meta":
            raise DeviceError("device 'meta' holds no values; name cpu or cuda")
        if named.type == "cpu":
            raise DeviceError(f"device '{device}' cannot be used: the CPU is one device; name it cpu")
        several = torch.cuda.device_count() > 1 or named.index
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from None
    if several:
        raise DeviceError(
            f"device '{device}': Trainer uses every GPU it sees; set CUDA_VISIBLE_DEVICES to the one to use "
            "(`sqft run --device cuda:1` does so) and name it cuda"
        )


def check_devices(names: Iterable[str]) -> None:
    """Check that there are these devices, each for a process of its own; no GPU is touched by this one.

    Raises:
        DeviceError: naming one that there is not.
    """
    import torch

    seen = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    for name in names:
        if not (seen and name.startswith("cuda")):
            check_device(name)
        elif name not in ("cuda", *seen):
            raise DeviceError(f"device '{name}' cannot be used: torch sees {', '.join(seen)}")


def check_training(steps: Iterable[Step], device: str, processes: int) -> None:
    """Check that `device` and the number of processes suit the fine-tuning among steps that are not done.

    Raises:
        DeviceError: naming the recipe's field that does not suit them.
    """
    for step in steps:
        if not isinstance(step.section, Finetune):
            continue
        if device == "cpu" and step.section.precision == "float16":
            raise DeviceError(
                "finetune.precision: float16 loses small gradients unless the loss is scaled, which needs an "
                "accelerator; on the CPU use bfloat16 or float32"
            )
        if (batch := step.section.batch_size) < processes:
            raise DeviceError(
                f"finetune.batch_size: {batch} examples are too few for {processes} processes, "
                "which share them; raise it, or start fewer processes"
            )


def check_model(plan: Plan, missing: Iterable[Step]) -> None:
    """Check the plan against the model's own modules and the teacher's tokens: no weight is read.

    Raises:
        SqftError: when the model is not what the plan expects, or sqft cannot work on it.
    """
    from sqft.stages.preflight import check_fit, check_vocabularies

    check_fit(plan)
    if any(isinstance(step.section, Finetune) for step in missing):
        check_vocabularies(plan)


def check_tasks(plan: Plan, missing: Sequence[Step]) -> None:
    """Check that lm-eval's tasks can be had and asked, where other steps would be made before they are needed.

    Raises:
        StageError: naming a task that cannot be loaded, and its data set, or the setting that does not fit.
    """
    measured = [step for step in missing if isinstance(step.section, Evaluate) and step.section.tasks]
    if not measured or measured[0] is missing[0]:
        return
    from sqft.stages.preflight import check_questions

    log.info("loading the data sets of evaluate.tasks")
    check_questions(plan, measured[0])
