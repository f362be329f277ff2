"""A run that cannot fit into memory is refused, with settings that would fit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import DeviceError
from sqft.execution.memory import alone_because, shortage_of, shortage_of_processes
from sqft.execution.preflight import IGNORE_MEMORY
from sqft.utils.distributed import Processes
from sqft.utils.text import human_size


@pytest.fixture
def orchestrator(registry: Registry, tmp_path: Path) -> Orchestrator:
    return Orchestrator(registry, tmp_path)


@pytest.fixture
def greedy(raw: dict[str, Any]) -> dict[str, Any]:
    """A recipe whose training takes most of all steps, by its batch."""
    raw = copy.deepcopy(raw)
    raw["finetune"] |= {"batch_size": 4096, "loss_on": "all", "max_length": 256}
    return raw


def limited(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr("sqft.execution.memory.free_memory", lambda processes=1: free)


def needed(orchestrator: Orchestrator, recipe: dict[str, Any], *changes: str) -> int:
    changed = Recipe.changed(copy.deepcopy(recipe), changes)
    return orchestrator.plan(changed).step("finetune").estimate.memory


CHECKPOINTING, CHUNK, PACKED = (
    "finetune.gradient_checkpointing=true",
    "finetune.loss_chunk=128",
    "finetune.base=packed",
)
HALVED = "finetune.batch_size=2048", "finetune.gradient_accumulation=2"


@pytest.mark.parametrize("changes", [(CHECKPOINTING,), (CHECKPOINTING, CHUNK), (CHECKPOINTING, CHUNK, PACKED, *HALVED)])
def test_settings_that_fit_are_named_and_no_more_than_it_takes(
    changes: tuple[str, ...], orchestrator: Orchestrator, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    enough = needed(orchestrator, greedy, *changes)
    limited(monkeypatch, enough)
    plan = orchestrator.plan(Recipe.parse(greedy))
    found = shortage_of(plan, ["finetune", "sparsify"], "cpu", orchestrator.plan)
    assert found is not None
    took = human_size(needed(orchestrator, greedy))
    settings = " ".join(f"--set {change}" for change in changes)
    assert found.message == (
        f"finetune needs about {took} of memory, and {human_size(enough)} are free; {settings} would need about "
        f"{human_size(enough)}"
    )


def test_a_batch_that_is_halved_again_is_named_once(
    orchestrator: Orchestrator, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limited(monkeypatch, 0)
    found = shortage_of(orchestrator.plan(Recipe.parse(greedy)), ["finetune"], "cpu", orchestrator.plan)
    assert found is not None and found.hopeless and found.message.count("finetune.batch_size=") == 1
    assert "--set finetune.batch_size=1 --set finetune.gradient_accumulation=4096" in found.message
    assert "; even --set finetune.gradient_checkpointing=true " in found.message
    assert found.message.endswith(": free some memory, or use a larger machine")


def test_steps_that_fit_or_are_done_or_run_on_a_device(
    orchestrator: Orchestrator, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = orchestrator.plan(Recipe.parse(greedy))
    limited(monkeypatch, needed(orchestrator, greedy))
    assert shortage_of(plan, ["finetune"], "cpu", orchestrator.plan) is None
    limited(monkeypatch, needed(orchestrator, greedy) - 1)
    found = shortage_of(plan, ["finetune"], "cpu", orchestrator.plan)
    assert found is not None and not found.hopeless
    assert shortage_of(plan, ["sparsify"], "cpu", orchestrator.plan) is None
    assert shortage_of(plan, ["finetune"], "cuda", orchestrator.plan) is None
    assert shortage_of(plan, [], "cpu", orchestrator.plan) is None


def test_a_run_is_refused_before_anything_is_made_unless_it_is_asked_for(
    orchestrator: Orchestrator, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limited(monkeypatch, 1 << 20)
    plan = orchestrator.plan(Recipe.parse(raw))
    with pytest.raises(DeviceError, match=r"needs about .* of memory, and 1 MiB are free; .*SQFT_IGNORE_MEMORY=1 in"):
        orchestrator.run(plan)
    assert not list(orchestrator.store.root.glob("artifacts/*"))
    monkeypatch.setenv(IGNORE_MEMORY, "1")
    orchestrator.run(plan, until="sparsify")
    assert any("of memory, and 1 MiB are free" in message for message in caplog.messages)


def test_processes_of_one_machine_are_counted_together_each_with_its_share_of_the_batch(
    orchestrator: Orchestrator, greedy: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, four = orchestrator.plan(Recipe.parse(greedy)), Processes(count=4)
    share = needed(orchestrator, greedy, "finetune.batch_size=1024")
    checkpointed = needed(orchestrator, greedy, "finetune.batch_size=1024", CHECKPOINTING)
    limited(monkeypatch, 4 * share)
    assert shortage_of_processes(plan, plan.steps, four, orchestrator.plan) is None
    assert 4 * share > needed(orchestrator, greedy) > share
    limited(monkeypatch, 4 * share - 1)
    found = shortage_of_processes(plan, plan.steps, four, orchestrator.plan)
    assert found is not None and not found.hopeless
    assert found.message == (
        f"finetune needs about {human_size(share)} of memory in each of 4 processes, and {human_size(4 * share - 1)} "
        f"are free; start fewer processes, or in each --set {CHECKPOINTING} would need about {human_size(checkpointed)}"
    )
    limited(monkeypatch, 4)
    found = shortage_of_processes(plan, plan.steps, four, orchestrator.plan)
    assert found is not None and found.hopeless and found.message.endswith("; start fewer processes")
    limited(monkeypatch, 4 * share - 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # the other two are on another machine
    assert shortage_of_processes(plan, plan.steps, four, orchestrator.plan) is None
    assert shortage_of_processes(plan, [plan.step("sparsify")], four, orchestrator.plan) is None


def test_calibration_is_shared_where_there_are_windows_and_memory_for_all_processes(
    orchestrator: Orchestrator, raw: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = orchestrator.plan(Recipe.parse(raw)).step("sparsify")
    limited(monkeypatch, 2 * step.estimate.memory)
    assert alone_because(step, 2, Processes(count=2)) is None
    assert alone_because(step, 1, Processes(count=2)) == "calibration.samples of 1 is too few for 2 processes"
    reason = alone_because(step, 3, Processes(count=3))
    assert reason is not None and reason.startswith("3 processes would need ")
