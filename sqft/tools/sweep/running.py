"""Run the cells of a sweep: all are planned first, then run one after the other, or side by side on several devices."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from sqft.errors import SqftError
from sqft.execution.orchestrator import Orchestrator
from sqft.execution.report import flat_rows
from sqft.planning.plan import Plan
from sqft.recipe.rerun import with_absolute_paths
from sqft.tools.sweep.comparison import differences
from sqft.tools.sweep.definition import Cell, Sweep
from sqft.tools.sweep.results import CellResult, SweepResults
from sqft.utils.files import write_json
from sqft.utils.text import shortened

log = logging.getLogger("sqft")
Plans = list[tuple[Cell, Plan]]


def plan_cells(sweep: Sweep, orchestrator: Orchestrator, changes: Sequence[str] = ()) -> Plans:
    """Plan all cells, before any is run; `changes` are made in all of them.

    Raises:
        SqftError: with every mistake of every cell, each once.
    """
    plans, mistakes = [], dict[str, list[Cell]]()
    cells = sweep.cells(changes)
    for cell in cells:
        try:
            plans.append((cell, orchestrator.load(cell.recipe, cell.changes)))
        except SqftError as error:
            mistakes.setdefault(str(error), []).append(cell)
    if mistakes:
        lines = [f"{shortened([f'({cell})' for cell in wrong], 1)}: {text}" for text, wrong in mistakes.items()]
        raise SqftError("\n".join([f"{sweep.source}: cells that cannot be run", *lines]))
    if not cells:
        raise SqftError(f"{sweep.source}: `skip` leaves no cell")
    return plans


def run_sweep(
    sweep: Sweep, orchestrator: Orchestrator, plans: Plans, devices: Sequence[str] = (), disable: Sequence[str] = ()
) -> SweepResults:
    """Run the cells that are not done; what is done is in `sweeps/NAME` of the store after each.

    A cell that fails does not stop the others.

    Args:
        sweep: the sweep.
        orchestrator: runs the cells, on its device, unless there are several devices.
        plans: of `plan_cells`.
        devices: cells run side by side, each in a process of its own: at most one on each device at a time. One that is
            named twice runs two.
        disable: plugins that these processes skip.
    """
    running = _Running(sweep, orchestrator, plans)
    if len(devices) > 1:
        with _Processes(running, disable) as processes:
            processes.run(devices)
    else:
        for cell, plan in running.open():
            running.run_here(cell, plan)
    results = running.results()
    results = replace(results, differences=tuple(differences(results, orchestrator.store.root)))
    results.write(running.folder)
    return results


@dataclass
class _Running:
    """A sweep while it runs: what became of each cell so far."""

    sweep: Sweep
    orchestrator: Orchestrator
    plans: Plans
    errors: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.orchestrator.store.root / "sweeps" / self.sweep.name

    def open(self) -> Iterator[tuple[Cell, Plan]]:
        """Yield the cells that are not done."""
        for number, (cell, plan) in enumerate(self.plans, 1):
            if self.rows(plan) is not None:
                log.info("cell %d of %d (%s): done before", number, len(self.plans), cell)
            else:
                log.info("cell %d of %d (%s)", number, len(self.plans), cell)
                yield cell, plan
        self.results().write(self.folder)

    def run_here(self, cell: Cell, plan: Plan) -> None:
        try:
            self.orchestrator.run(self.orchestrator.plan(plan.recipe))
        except Exception as error:  # a cell that fails must not stop the others
            self.failed(cell, str(error) if isinstance(error, SqftError) else f"{type(error).__name__}: {error}")
        self.results().write(self.folder)

    def failed(self, cell: Cell, error: str) -> None:
        self.errors[cell.name] = error
        log.error("cell (%s) failed: %s", cell, error)

    def results(self) -> SweepResults:
        found = (
            CellResult(cell, self.run_folder(plan), self.rows(plan), self.errors.get(cell.name))
            for cell, plan in self.plans
        )
        return SweepResults(self.sweep.name, tuple(self.sweep.axes), tuple(found))

    def run_folder(self, plan: Plan) -> Path:
        return self.orchestrator.store.runs / f"{plan.recipe.name}-{plan.fingerprint[:8]}"

    def rows(self, plan: Plan) -> tuple[dict[str, Any], ...] | None:
        """Return what a cell measured; None unless all of its steps are in the store, and its report is written."""
        store = self.orchestrator.store
        if not all(store.is_complete(step.stage, step.fingerprint) for step in plan.steps):
            return None
        try:
            report: Mapping[str, Any] = json.loads((self.run_folder(plan) / "report.json").read_text("utf-8"))
            return tuple(flat_rows(report)) if len(report["steps"]) == len(plan.steps) else None
        except (OSError, ValueError, LookupError):
            return None


class _Processes:
    """Runs cells by `sqft run`, a process for each; those that are left at the end are stopped."""

    def __init__(self, running: _Running, disable: Sequence[str]) -> None:
        self.running, self.disable = running, disable
        self.alive: set[subprocess.Popen[bytes]] = set()
        self.stopped = False

    def __enter__(self) -> _Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped = True
        for process in [*self.alive]:
            process.terminate()

    def run(self, devices: Sequence[str]) -> None:
        waiting: SimpleQueue[tuple[Cell, Plan]] = SimpleQueue()
        for one in self.running.open():
            waiting.put(one)

        def work(device: str) -> None:
            while not self.stopped:
                try:
                    self.run_one(*waiting.get_nowait(), device)
                except Empty:
                    return

        with ThreadPoolExecutor(len(devices)) as pool:
            futures = [pool.submit(work, device) for device in devices]
            try:
                for future in futures:
                    future.result()
            finally:
                self.__exit__()

    def run_one(self, cell: Cell, plan: Plan, device: str) -> None:
        folder, start = self.running.folder / "cells", time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        recipe, said = folder / f"{cell.name}.json", folder / f"{cell.name}.log"
        write_json(recipe, with_absolute_paths(plan.recipe))
        words = ["run", str(recipe), "--store", str(self.running.orchestrator.store.root), "--device", device]
        words += [word for plugin in self.disable for word in ("--disable", plugin)]
        with said.open("wb") as output:
            process = subprocess.Popen([sys.executable, "-m", "sqft", *words], stdout=output, stderr=subprocess.STDOUT)
            self.alive.add(process)
            status = process.wait()
            self.alive.discard(process)
        if self.stopped:
            return
        if status:
            text = said.read_text("utf-8", "replace")
            self.running.failed(cell, text.rpartition("error: ")[2].strip() or f"status {status}; see {said}")
        else:
            log.info("cell (%s): done in %.0f s on %s", cell, time.monotonic() - start, device)
        self.running.results().write(self.running.folder)
