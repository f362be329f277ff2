"""Only a checkpoint that was sealed, and is as it was sealed, is resumed from."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import TrainerState

from sqft.modeling.training.checkpoints import SEAL_FILE, CheckpointSealer, newest_complete, resume, seal
from sqft.utils.distributed import Processes


def write(checkpoints: Path, step: int, steps: int = 8, sealed: bool = True) -> Path:
    folder = checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    save_file({"B": torch.full((2,), float(step))}, folder / "model.safetensors")
    state = TrainerState(global_step=step, max_steps=steps)
    state.save_to_json(str(folder / "trainer_state.json"))
    if sealed:
        seal(folder)
    return folder


def damage(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"other")


def lose(folder: Path) -> None:
    (folder / "trainer_state.json").unlink()


def cut_off(folder: Path) -> None:
    (folder / SEAL_FILE).write_text('{"model.')


def test_the_newest_by_number(tmp_path: Path) -> None:
    assert newest_complete(tmp_path / "none", Processes()) is None
    for step in (2, 10, 9):
        write(tmp_path, step)
    assert newest_complete(tmp_path, Processes()) == tmp_path / "checkpoint-10"
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("spoil", [damage, lose, cut_off])
def test_one_that_is_not_as_it_was_sealed_is_deleted(tmp_path: Path, spoil: Any) -> None:
    older, newer = write(tmp_path, 2), write(tmp_path, 4)
    spoil(newer)
    assert newest_complete(tmp_path, Processes()) == older and not newer.exists()


def test_one_that_was_not_sealed_is_deleted(tmp_path: Path) -> None:
    write(tmp_path, 2, sealed=False)
    assert newest_complete(tmp_path, Processes()) is None and not list(tmp_path.iterdir())


def test_older_ones_are_not_read(tmp_path: Path) -> None:
    """Trainer deletes them in its own time."""
    damage(write(tmp_path, 2))
    write(tmp_path, 4)
    assert newest_complete(tmp_path, Processes()) == tmp_path / "checkpoint-4"
    assert (tmp_path / "checkpoint-2").exists()


def test_the_sealer_removes_the_pickle_and_seals(tmp_path: Path) -> None:
    folder = write(tmp_path, 3, sealed=False)
    (folder / "training_args.bin").write_bytes(b"a pickle")
    CheckpointSealer(Processes()).on_save(SimpleNamespace(output_dir=str(tmp_path)), TrainerState(global_step=3), None)
    assert not (folder / "training_args.bin").exists()
    assert newest_complete(tmp_path, Processes()) == folder


class Trainer:
    """As much of a trainer as resuming touches."""

    def __init__(self) -> None:
        self.state = TrainerState(global_step=8)
        self.trained_from: list[str | None] = []
        self.loaded: dict[str, Tensor] = {}
        self.model = SimpleNamespace(load_state_dict=self.loaded.update)

    def train(self, resume_from_checkpoint: str | None) -> None:
        self.trained_from.append(resume_from_checkpoint)


class Best:
    def __init__(self, stops: bool = False) -> None:
        self.stops, self.read = stops, list[Path]()

    def load(self, folder: Path) -> None:
        self.read.append(folder)


def test_training_begins_or_goes_on(tmp_path: Path) -> None:
    trainer: Any = Trainer()
    best: Any = Best()
    assert resume(trainer, best, None) is trainer.state and not best.read
    folder = write(tmp_path, 4)
    assert resume(trainer, best, folder) is trainer.state and best.read == [folder]
    assert trainer.trained_from == [None, str(folder)] and not trainer.loaded


@pytest.mark.parametrize(("step", "stops"), [(8, False), (4, True)], ids=["last step", "patience"])
def test_a_finished_checkpoint_is_only_read(tmp_path: Path, step: int, stops: bool) -> None:
    """Trainer would take one step more from it."""
    trainer: Any = Trainer()
    best: Any = Best(stops)
    state = resume(trainer, best, write(tmp_path, step))
    assert state.global_step == step and not trainer.trained_from
    assert trainer.loaded["B"].tolist() == [step, step]
