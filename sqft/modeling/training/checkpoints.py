"""Trainer's checkpoints: each is sealed once it is complete, and training resumes only from a sealed one."""

from __future__ import annotations

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from transformers import TrainerCallback, TrainerState

from sqft.modeling.training.trainer import DeltaTrainer, EarlyStopping
from sqft.utils.digests import Digests
from sqft.utils.distributed import Processes
from sqft.utils.files import write_json

log = logging.getLogger("sqft")
SEAL_FILE = "complete.json"
"""Written last into a checkpoint: the checksums of its files. A checkpoint without it does not count."""


class CheckpointSealer(TrainerCallback):
    """Seal each checkpoint once all processes have written their part of it."""

    def __init__(self, processes: Processes) -> None:
        self.processes = processes

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.processes.barrier()
        if self.processes.is_main:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle of settings that nothing reads
            seal(folder)


def resume(trainer: DeltaTrainer, best: EarlyStopping, newest: Path | None) -> TrainerState:
    """Train from the newest checkpoint to the end; return Trainer's state there.

    A checkpoint of the last step is only read: Trainer would take one step more from it.
    """
    if newest:
        log.info("resuming fine-tuning from %s", newest.name)
        state = TrainerState.load_from_json(str(newest / "trainer_state.json"))
        best.load(newest)
        if state.global_step >= state.max_steps or best.stops:
            trainer.model.load_state_dict(load_file(newest / "model.safetensors"))
            return state
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    return trainer.state


def seal(folder: Path) -> None:
    """Write the checksums of a folder's files into it, once all of them are on disk."""
    digests = Digests()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    write_json(folder / SEAL_FILE, {f.name: digests.file(f) for f in sorted(folder.iterdir()) if f.name != SEAL_FILE})


def newest_complete(checkpoints: Path, processes: Processes) -> Path | None:
    """Return the newest checkpoint whose files are as they were sealed; the first process deletes all newer ones."""
    newest = _newest_complete(checkpoints) if processes.is_main else None
    name = processes.share(newest.name if newest else "")
    return checkpoints / name if name else None


def _newest_complete(checkpoints: Path) -> Path | None:
    newest = None
    folders = [folder for folder in checkpoints.glob("checkpoint-*") if folder.is_dir()]
    for folder in sorted(folders, key=lambda f: int(f.name.rpartition("-")[2]), reverse=True):
        if newest is None and is_complete(folder):
            newest = folder
        elif newest is None:
            log.warning("%s was interrupted while it was written and is not used", folder.name)
            shutil.rmtree(folder)
    return newest


def is_complete(folder: Path) -> bool:
    """Return whether a folder was sealed, and its files are as they were then."""
    try:
        sealed: dict[str, str] = json.loads((folder / SEAL_FILE).read_text())
        digests = Digests()
        return bool(sealed) and all(digests.file(folder / name) == digest for name, digest in sealed.items())
    except (OSError, ValueError, AttributeError):
        return False
