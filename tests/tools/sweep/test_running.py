"""Cells on tiny models: shared steps, failures, what is done before, and processes side by side."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from sqft import Orchestrator, Registry
from sqft.errors import DeviceError, SqftError
from sqft.store.runs import find_run
from sqft.tools.sweep import Sweep, plan_cells, run_sweep
from sqft.tools.sweep.running import _error_in, _Running


@pytest.fixture
def recipe(raw: dict[str, Any], tmp_path: Path) -> Path:
    """Sparsified and trained for two steps, then measured."""
    raw["evaluate"]["of"] = ["sparsify", "search"]
    raw["finetune"]["steps"] = 2
    raw["search"] = {"searcher": "heuristic"}
    for section in ("merge", "export", "quantize"):
        raw.pop(section, None)
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(raw))
    return file


@pytest.fixture
def sweep(recipe: Path, tmp_path: Path) -> Sweep:
    axes = {
        "adapter": {"small": {"finetune.learning_rate": 1e-3}, "large": {"finetune.learning_rate": 0.1}},
        "seed": [0, 1],
    }
    return Sweep.parse({"name": "s", "recipe": str(recipe), "axes": axes}, tmp_path)


@pytest.fixture
def orchestrator(registry: Registry, tmp_path: Path) -> Orchestrator:
    return Orchestrator(registry, tmp_path / "store")


def test_shared_steps_are_made_once_and_nothing_is_done_again(
    sweep: Sweep, orchestrator: Orchestrator, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = plan_cells(sweep, orchestrator)
    results = run_sweep(sweep, orchestrator, plans)
    assert [one.state for one in results.cells] == ["done"] * 4
    made = [folder.name.partition("-")[0] for folder in (orchestrator.store.root / "artifacts").glob("[a-z]*")]
    assert made.count("sparsify") == 2 and made.count("finetune") == 4  # calibration windows are drawn by the seed
    rows = results.rows()
    assert {(row["adapter"], row["seed"], row["configuration"]) for row in rows} == {
        (adapter, seed, of)
        for adapter in ("small", "large")
        for seed in (0, 1)
        for of in ("sparsify", "search (heuristic)")
    }
    folder = orchestrator.store.root / "sweeps" / "s"
    assert json.loads((folder / "results.json").read_text())["rows"] == rows
    assert {file.name for file in folder.iterdir()} == {"results.json", "results.csv", "report.md"}
    # A second time: nothing is run, and the results are the same.
    monkeypatch.setattr(Orchestrator, "run", lambda *_: pytest.fail("ran a cell again"))
    with caplog.at_level(logging.INFO, "sqft"):
        again = run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator))
    assert again.rows() == rows and sum("done before" in record.getMessage() for record in caplog.records) == 4


def test_a_cell_that_fails_does_not_stop_the_others(
    sweep: Sweep, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One fails as the user can mend it, one by a bug; run again, only these are run."""
    run, ran = Orchestrator.run, list[str]()

    def failing(self: Orchestrator, plan: Any, *arguments: Any) -> Any:
        ran.append(plan.recipe.name)
        if plan.recipe.name == "s-small-1":
            raise SqftError("no room")
        if plan.recipe.name == "s-large-0":
            raise ZeroDivisionError("oh")
        return run(self, plan, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Orchestrator, "run", failing)
        results = run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator))
    assert [one.state for one in results.cells] == ["done", "failed", "failed", "done"] and len(ran) == 4
    assert [one.error for one in results.failed] == ["no room", "ZeroDivisionError: oh"]
    read = json.loads((orchestrator.store.root / "sweeps" / "s" / "results.json").read_text())
    assert [cell["error"] for cell in read["cells"]] == [None, "no room", "ZeroDivisionError: oh", None]
    assert [one.state for one in run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator)).cells] == ["done"] * 4


def test_all_cells_are_planned_before_one_is_run(recipe: Path, orchestrator: Orchestrator, tmp_path: Path) -> None:
    axes = {"sparsify.sparsity": [0.5, 1.5], "finetune.adapter": ["lora", "lorra"], "seed": [0, 1]}
    sweep = Sweep.parse({"name": "s", "recipe": str(recipe), "axes": axes}, tmp_path, "mine.json")
    with pytest.raises(SqftError) as caught:
        plan_cells(sweep, orchestrator)
    head, *lines = str(caught.value).splitlines()
    assert head == "mine.json: cells that cannot be run"
    places = [line if "recipe.json" in line else line.partition(": ")[0] for line in lines]
    which = ["finetune.adapter lorra, seed 0) and 3 more", "sparsify.sparsity 1.5"]
    assert len(places) == 4 and which[0] in places[0] and which[1] in places[2]
    assert places[1::2] == ["  finetune.adapter", "  sparsify.sparsity"]  # each once
    assert lines[0].startswith("(sparsify.sparsity 0.5, finetune.adapter lorra, seed 0)")
    assert "no adapter named 'lorra'" in lines[1]
    crossed = {"sparsify.sparsity": [1.5, 0.5], "finetune.steps": [-1, 9]}
    with pytest.raises(SqftError) as caught:
        plan_cells(Sweep.parse({"name": "s", "recipe": str(recipe), "axes": crossed}, tmp_path, "m"), orchestrator)
    both = "(sparsify.sparsity 1.5, finetune.steps -1) and 1 more: "  # one of the two cells is another one
    assert [line.startswith(both) for line in str(caught.value).splitlines()[1:]] == [True, False] * 2
    with pytest.raises(SqftError, match=r"\nall cells: .*recipe.json\n  finetune.steps: ") as caught:
        plan_cells(sweep, orchestrator, ["finetune.steps=-1"])
    other = recipe.with_name("other.json")
    other.write_text(recipe.read_text())
    axes = {"file": {"a": {"recipe": str(recipe)}, "b": {"recipe": str(other)}}, "seed": [0, 1]}
    with pytest.raises(SqftError, match=r"cannot be run\nall cells:\n  finetune.steps: [^\n]*$"):
        plan_cells(Sweep.parse({"name": "s", "axes": axes}, tmp_path, "m"), orchestrator, ["finetune.steps=-1"])
    assert not (tmp_path / "store").exists()
    twice = {"a": {"x": {"sparsify.sparsity": 0.5}, "y": {"recipe": str(recipe)}}}
    with pytest.raises(SqftError, match=r"\(a x\) and \(a y\) are the same run"):
        plan_cells(Sweep.parse({"name": "s", "recipe": str(recipe), "axes": twice}, tmp_path), orchestrator)
    dense = {"sparsify": None, "finetune": None, "search": None, "evaluate.of": ["model"]}
    seeds = {"name": "s", "recipe": str(recipe), "axes": {"a": {"dense": dense, "tuned": {}}, "seed": [0, 1]}}
    assert len(plan_cells(Sweep.parse(seeds, tmp_path), orchestrator)) == 4
    with pytest.raises(SqftError, match="`skip` leaves no cell"):
        everything = {"name": "s", "recipe": str(recipe), "axes": {"seed": [0]}, "skip": [{"seed": 0}]}
        plan_cells(Sweep.parse(everything, tmp_path), orchestrator)


@pytest.fixture
def pair(recipe: Path, tmp_path: Path) -> Sweep:
    return Sweep.parse({"name": "s", "recipe": str(recipe), "axes": {"seed": [0, 1]}}, tmp_path)


def test_cells_side_by_side(pair: Sweep, orchestrator: Orchestrator, tmp_path: Path) -> None:
    """Two processes at a time: the results are those of one process."""
    results = run_sweep(pair, orchestrator, plan_cells(pair, orchestrator), ["cpu", "cpu"])
    assert [one.error for one in results.cells] == [None] * 2
    alone = Orchestrator(orchestrator.registry, tmp_path / "alone")
    expected = run_sweep(pair, alone, plan_cells(pair, alone))

    def figures(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [
            {k: v for k, v in row.items() if "seconds" not in k and k not in ("peak_memory", "storage")} for row in rows
        ]

    assert figures(results.rows()) == figures(expected.rows())
    assert logs(orchestrator) == {"s-0.log", "s-1.log"}


def logs(orchestrator: Orchestrator) -> set[str]:
    return {file.name for file in (orchestrator.store.root / "sweeps" / "s" / "cells").glob("*.log")}


def test_one_device_that_is_named_is_the_one_that_runs(pair: Sweep, orchestrator: Orchestrator) -> None:
    orchestrator.device = "cuda:7"
    plans = plan_cells(pair, orchestrator)[:1]
    assert [one.error for one in run_sweep(pair, orchestrator, plans, ["cpu"]).cells] == [None]
    assert logs(orchestrator) == {"s-0.log"}


def test_a_process_that_fails_is_named(pair: Sweep, recipe: Path, orchestrator: Orchestrator) -> None:
    raw = json.loads(recipe.read_text())
    data = shutil.copy(raw["finetune"]["data"], recipe.parent / "train.jsonl")
    raw["finetune"]["data"] = str(data)
    recipe.write_text(json.dumps(raw))
    plans = plan_cells(pair, orchestrator)
    data.unlink()
    results = run_sweep(pair, orchestrator, plans, ["cpu", "cpu"])
    assert [one.state for one in results.cells] == ["failed"] * 2
    for one in results.cells:
        assert one.error and "finetune.data.path: there is no file" in one.error, one.error


@pytest.mark.parametrize("devices", [["cpu", "cuda:7"], ["cpuu", "cpu"], ["cuda:x", "cpu"]])
def test_devices_are_checked_before_a_cell_runs(
    devices: list[str], pair: Sweep, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(DeviceError, match=r"device '(cuda:7|cpuu|cuda:x)' cannot be used"):
        run_sweep(pair, orchestrator, plan_cells(pair, orchestrator), devices)
    orchestrator.device = "cpuu"
    with pytest.raises(DeviceError, match="device 'cpuu' cannot be used"):
        run_sweep(pair, orchestrator, plan_cells(pair, orchestrator))
    assert not orchestrator.store.root.exists()


def test_what_is_known_stays_while_cells_run(
    sweep: Sweep, orchestrator: Orchestrator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of earlier cells are in the results when a new one is stopped, and its run is the newest again."""
    known, touch = run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator)).differences, os.utime
    assert known
    runs = orchestrator.store.root / "runs"
    newest = {find_run(name, orchestrator.store.root)[0] for name in ("s-small-0", "s-large-1")}
    for folder in newest:
        another = runs / f"{folder.name.rpartition('-')[0]}-another"
        shutil.copytree(folder, another)
        os.utime(another / "recipe.json", (newer := time.time() + 60, newer))
    assert find_run("s-small-0", orchestrator.store.root)[0] not in newest
    monkeypatch.setattr("os.utime", lambda file: touch(file, (newer + 60, newer + 60)))  # as if a minute later
    more = Sweep.parse({"name": "s", "recipe": sweep.recipe, "axes": sweep.axes | {"seed": [0, 1, 2]}}, runs)

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Orchestrator, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_sweep(more, orchestrator, plan_cells(more, orchestrator))
    read = json.loads((orchestrator.store.root / "sweeps" / "s" / "results.json").read_text())
    assert [one["by_seed"] for one in read["differences"]] == [one.by_seed for one in known]
    assert find_run("s-small-0", orchestrator.store.root)[0] in newest


def test_how_a_process_ended(tmp_path: Path) -> None:
    said = tmp_path / "said.log"
    said.write_text("the lowest error: 0.4\n")
    assert _error_in(said, -9) == f"its process was killed by SIGKILL; what it printed is in {said}"
    assert _error_in(said, 2) == f"its process ended with status 2; what it printed is in {said}"
    said.write_text("a\nerror: one\nerror: two\n  of it\n")
    assert _error_in(said, 2) == "two\n  of it" and "status 1" in _error_in(said, 1)


def test_a_cell_whose_recipe_is_gone_is_made_again(pair: Sweep, orchestrator: Orchestrator) -> None:
    run_sweep(pair, orchestrator, plan_cells(pair, orchestrator))
    (file,) = (orchestrator.store.root / "runs").glob("s-1-*/recipe.json")
    content = file.read_text()
    file.unlink()
    assert [one.state for one in run_sweep(pair, orchestrator, plan_cells(pair, orchestrator)).cells] == ["done"] * 2
    assert file.read_text() == content


@pytest.mark.parametrize("content", ["null", "[]", '{"steps": null, "rows": []}', "{", '{"steps": [], "rows": [5]}'])
def test_a_damaged_report_is_made_again(content: str, recipe: Path, orchestrator: Orchestrator, tmp_path: Path) -> None:
    raw = json.loads(recipe.read_text())
    raw["evaluate"]["of"] = ["sparsify"]
    for section in ("finetune", "search"):
        del raw[section]
    recipe.write_text(json.dumps(raw))
    sweep = Sweep.parse({"name": "s", "recipe": str(recipe), "axes": {"sparsify.sparsity": [0.5]}}, tmp_path)
    rows = run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator)).rows()
    (report,) = (orchestrator.store.root / "runs").glob("*/report.json")
    report.write_text(content)
    assert run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator)).rows() == rows


def test_cells_that_end_together_write_in_turn(pair: Sweep, orchestrator: Orchestrator, tmp_path: Path) -> None:
    running = _Running(orchestrator, plan_cells(pair, orchestrator), pair, tmp_path / "out")
    with ThreadPoolExecutor(8) as pool:
        for written in [pool.submit(running.write) for _ in range(100)]:
            written.result()
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"] == []


def test_what_is_changed_in_all_cells_has_results_of_its_own(pair: Sweep, orchestrator: Orchestrator) -> None:
    changes = ["finetune.steps=1"]
    results = run_sweep(pair, orchestrator, plan_cells(pair, orchestrator, changes), changes=changes)
    assert results.folder.name.startswith("s-") and len(results.folder.name) == 10
    assert "finetune.steps=1" in json.loads((results.folder / "results.json").read_text())["cells"][0]["changes"]


STOPPED = """
import sys
from sqft import Orchestrator, Registry
from sqft.tools.sweep import Sweep, plan_cells, run_sweep
orchestrator = Orchestrator(Registry.discover(), sys.argv[2])
sweep = Sweep.load(sys.argv[1])
run_sweep(sweep, orchestrator, plan_cells(sweep, orchestrator), ["cpu", "cpu"])
"""


@pytest.mark.parametrize("by_command", [True, False])
def test_sigterm_stops_the_processes_too(pair: Sweep, recipe: Path, tmp_path: Path, by_command: bool) -> None:
    raw = json.loads(recipe.read_text())
    raw["finetune"]["steps"] = 100_000
    recipe.write_text(json.dumps(raw))
    file, store = tmp_path / "sweep.json", tmp_path / "store"
    file.write_text(json.dumps({"name": "s", "recipe": str(recipe), "axes": {"seed": [0, 1]}}))
    words = ["-m", "sqft", "sweep", str(file), "--device", "cpu", "--device", "cpu", "--store", str(store)]
    sweeping = subprocess.Popen([sys.executable, *(words if by_command else ["-c", STOPPED, str(file), str(store)])])
    try:
        logs = [store / "sweeps" / "s" / "cells" / f"s-{seed}.log" for seed in (0, 1)]
        deadline = time.monotonic() + 120
        while not all(log.is_file() and "finetune" in log.read_text() for log in logs):
            assert time.monotonic() < deadline and sweeping.poll() is None
            time.sleep(0.2)
        children = psutil.Process(sweeping.pid).children()
        assert len(children) == 2
        sweeping.terminate()
        assert sweeping.wait(60) == (128 + signal.SIGTERM if by_command else 1)
        assert all("To continue: sqft run" in log.read_text() for log in logs)
        assert not psutil.wait_procs(children, timeout=10)[1]
    finally:
        sweeping.kill()
