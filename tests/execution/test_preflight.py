"""What is checked before a run makes anything."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import DeviceError, StageError, StoreError
from sqft.execution.preflight import check_device, check_disk, check_tasks, check_training, unusable
from sqft.recipe.sections import Evaluate, Finetune, Merge
from sqft.store.artifacts import Store


def step(stage: str = "merge", fingerprint: str = "a" * 64, storage: int = 0, section: Any = None) -> Any:
    return SimpleNamespace(
        stage=stage, fingerprint=fingerprint, estimate=SimpleNamespace(storage=storage), section=section or Merge()
    )


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A store that is not made yet, on a disk with 10 KiB free."""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10 << 10))
    return Store(tmp_path / "not" / "made" / "yet")


def test_the_disk_has_room_for_what_is_missing(store: Store, tmp_path: Path) -> None:
    check_disk(store, [step(storage=4 << 10), step(fingerprint="b" * 64, storage=6 << 10)])
    with pytest.raises(StoreError, match=f"needs about 11 KiB and {tmp_path} has 10 KiB free; make room") as caught:
        check_disk(store, [step(storage=5 << 10), step(fingerprint="b" * 64, storage=6 << 10)])
    assert str(store.root) in str(caught.value) and not store.root.exists()


def test_a_folder_that_nothing_may_be_written_to(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unusable(store) is None
    monkeypatch.setattr("os.access", lambda *_: False)  # root may write everywhere
    assert f"{tmp_path} may not be written to; name another with --store" in str(unusable(store))


def test_what_is_stored_already_needs_no_room(store: Store) -> None:
    with store.begin("merge", "a" * 64) as scratch:
        store.commit(scratch, {"stage": "merge", "fingerprint": "a" * 64, "report": {}})
    check_disk(store, [step(storage=1 << 40)])


def test_what_a_killed_run_has_written_needs_no_more_room(store: Store) -> None:
    part = store.partial("merge", "a" * 64) / "model" / "part.safetensors"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(3 << 10))
    check_disk(store, [step(storage=13 << 10)])
    with pytest.raises(StoreError, match="needs about 11 KiB"):
        check_disk(store, [step(storage=14 << 10)])


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "device 'meta' holds no values; name cpu or cuda"),
        ("nonsense", "device 'nonsense' cannot be used: "),
        ("cuda:x", "device 'cuda:x' cannot be used: "),
        ("cpu:1", "device 'cpu:1' cannot be used: the CPU is one device; name it cpu"),
    ],
)
def test_a_device_that_cannot_be_used(device: str, message: str) -> None:
    check_device("cpu")
    with pytest.raises(DeviceError, match=message):
        check_device(device)


@pytest.mark.parametrize(("device", "count"), [("cuda", 2), ("cuda:1", 1)])
def test_one_gpu_alone_may_be_visible(monkeypatch: pytest.MonkeyPatch, device: str, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    with pytest.raises(DeviceError, match="Trainer uses every GPU it sees; set CUDA_VISIBLE_DEVICES"):
        check_device(device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    check_device("cuda")
    check_device("cuda:0")


def finetune(**settings: Any) -> Any:
    section = {"adapter": "nls", "merger": "sparsepeft", "data": "a.jsonl", **settings}
    return step("finetune", section=Finetune.model_validate(section))


@pytest.mark.parametrize(
    ("settings", "device", "processes", "message"),
    [
        ({}, "cpu", 16, None),
        ({"precision": "bfloat16"}, "cpu", 1, None),
        ({"precision": "float16"}, "cuda", 1, None),
        ({"precision": "float16"}, "cpu", 1, "finetune.precision: float16 loses small gradients"),
        ({"batch_size": 2}, "cpu", 3, "finetune.batch_size: 2 examples are too few for 3 processes"),
    ],
)
def test_training_fits_the_device_and_the_processes(
    settings: dict[str, Any], device: str, processes: int, message: str | None
) -> None:
    if message is None:
        check_training([step(), finetune(**settings)], device, processes)
    else:
        with pytest.raises(DeviceError, match=message):
            check_training([step(), finetune(**settings)], device, processes)


def test_data_sets_of_tasks_are_loaded_before_other_steps(tmp_path: Path, model_folder: Path) -> None:
    """Not where the evaluation comes first: it would load them twice."""
    (tmp_path / "far.yaml").write_text(
        f"task: far\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'none.jsonl'}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_text: x\ndoc_to_target: y\n"
    )
    measured = step("evaluate", section=Evaluate(tasks=("far",)))
    measured.files = {"include_path": tmp_path}
    recipe = SimpleNamespace(model=SimpleNamespace(chat_template_kwargs={}))
    plan: Any = SimpleNamespace(recipe=recipe, model_spec=ModelSpec(model_folder))
    for steps in ([measured], [measured, step()], [step()], [step(), step("evaluate", section=Evaluate())]):
        check_tasks(plan, steps)
    with pytest.raises(StageError, match=r"evaluate.tasks: 'far' \(data set json\) cannot be loaded"):
        check_tasks(plan, [step(), measured])
