"""Run the cells of a sweep: all are planned first, then run one after the other, or side by side on several devices."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock
from typing import Any

from sqft.errors import RecipeError, SqftError
from sqft.execution.orchestrator import Orchestrator
from sqft.execution.preflight import check_device, check_devices
from sqft.execution.report import flat_rows
from sqft.execution.run_folder import run_folder
from sqft.planning.plan import Plan
from sqft.recipe.rerun import with_absolute_paths
from sqft.tools.sweep.comparison import differences
from sqft.tools.sweep.definition import Cell, Sweep
from sqft.tools.sweep.results import CellDifference, CellResult, SweepResults
from sqft.utils.files import write_json
from sqft.utils.termination import terminable
from sqft.utils.text import shortened

log = logging.getLogger("sqft")
Plans = list[tuple[Cell, Plan]]


def plan_cells(sweep: Sweep, orchestrator: Orchestrator, changes: Sequence[str] = ()) -> Plans:
    """Plan all cells, before any is run; `changes` are made in all of them.

    Raises:
        SqftError: with every mistake of every cell, each once.
    """
    plans, mistakes = [], dict[str, dict[str, Cell]]()
    cells = sweep.cells(changes)
    for cell in cells:
        try:
            plans.append((cell, orchestrator.load(cell.recipe, cell.changes)))
        except SqftError as error:
            for mistake in map(str, error.problems if isinstance(error, RecipeError) else [error]):
                mistakes.setdefault(mistake, {})[cell.name] = cell
    if mistakes:
        raise SqftError("\n".join([f"{sweep.source}: cells that cannot be run", *_by_cells(mistakes, len(cells))]))
    if not cells:
        raise SqftError(f"{sweep.source}: `skip` leaves no cell")
    same: dict[str, list[Cell]] = {}
    for cell, plan in plans:
        same.setdefault(plan.fingerprint, []).append(cell)
    for one, *others in same.values():
        # Seeds may come to the same run: where only a model is measured that draws nothing.
        if other := next((other for other in others if other.combination != one.combination), None):
            both = f"({one}) and ({other})"
            raise SqftError(f"{sweep.source}: {both} are the same run; leave one out with `skip`, or remove a value")
    if not any(step.stage == "evaluate" for _, plan in plans for step in plan.steps):
        log.warning("no cell measures anything; add evaluate to the recipe, or to `set`")
    return plans


def _by_cells(mistakes: Mapping[str, Mapping[str, Cell]], count: int) -> Iterator[str]:
    """Yield lines: the cells, of `count`, that have the same mistakes, and below them these mistakes."""
    found: dict[tuple[str, ...], list[str]] = {}
    for mistake, wrong in mistakes.items():
        found.setdefault(tuple(wrong), []).append(mistake)
    for below in found.values():
        wrong = mistakes[below[0]]
        which = "all cells" if len(wrong) == count > 1 else shortened([f"({cell})" for cell in wrong.values()], 1)
        recipes = {str(cell.recipe) for cell in wrong.values()}
        yield f"{which}: {recipes.pop()}" if len(recipes) == 1 else f"{which}:"
        yield from (f"  {mistake}" for mistake in below)


def run_sweep(
    sweep: Sweep,
    orchestrator: Orchestrator,
    plans: Plans,
    devices: Sequence[str] = (),
    disable: Sequence[str] = (),
    changes: Sequence[str] = (),
) -> SweepResults:
    """Run the cells that are not done; what is done is in `sweeps/NAME` of the store after each.

    A cell that fails does not stop the others.

    Args:
        sweep: the sweep.
        orchestrator: runs the cells, on its device, unless others are named.
        plans: of `plan_cells`.
        devices: run cells side by side there, each in a process of its own: at most one on each device at a time. One
            that is named twice runs two.
        disable: plugins that these processes skip. They know the installed ones only.
        changes: those of `plan_cells`; with some, results are in a folder of their own.
    """
    running = _Running(orchestrator, plans, sweep, orchestrator.store.root / "sweeps" / sweep.named(changes))
    if running.is_open():
        check_devices(devices) if devices else check_device(orchestrator.device)
        running.compare()
    if devices:
        with terminable():
            _Processes(running, disable).run(devices)
    else:
        for cell, plan in running.open():
            running.run_here(cell, plan)
    return running.compare()


@dataclass
class _Running:
    """A sweep while it runs: what became of each cell so far. Its methods may be called from several threads."""

    orchestrator: Orchestrator
    plans: Plans
    sweep: Sweep
    folder: Path
    errors: dict[str, str] = field(default_factory=dict)
    known: dict[str, tuple[dict[str, Any], ...]] = field(default_factory=dict)
    differences: tuple[CellDifference, ...] = ()
    """Of the cells that were done when they were last compared."""
    lock: Any = field(default_factory=Lock)

    def is_open(self) -> bool:
        """Return whether a cell is not done."""
        return any(self.rows(plan) is None for _, plan in self.plans)

    def compare(self) -> SweepResults:
        """Compare the cells that are done, write the results, and return them."""
        self.differences = tuple(differences(self.results(), self.orchestrator.store.root))
        self.write()
        return self.results()

    def open(self) -> Iterator[tuple[Cell, Plan]]:
        """Yield the cells that are not done; the run of one that is becomes the newest of its name."""
        for number, (cell, plan) in enumerate(self.plans, 1):
            if self.rows(plan) is not None:
                with self.orchestrator.store.writing():
                    os.utime(run_folder(self.orchestrator.store, plan) / "recipe.json")
                log.info("cell %d of %d (%s): done before", number, len(self.plans), cell)
            else:
                log.info("cell %d of %d (%s)", number, len(self.plans), cell)
                yield cell, plan

    def run_here(self, cell: Cell, plan: Plan) -> None:
        try:
            self.orchestrator.run(self.orchestrator.plan(plan.recipe))
        except Exception as error:  # a cell that fails must not stop the others
            self.failed(cell, str(error) if isinstance(error, SqftError) else f"{type(error).__name__}: {error}")
        self.write()

    def failed(self, cell: Cell, error: str) -> None:
        with self.lock:
            self.errors[cell.name] = error
        log.error("cell (%s) failed: %s", cell, error)

    def write(self) -> None:
        with self.lock, self.orchestrator.store.writing():
            self.results().write()

    def results(self) -> SweepResults:
        found = (
            CellResult(cell, run_folder(self.orchestrator.store, plan), self.rows(plan), self.errors.get(cell.name))
            for cell, plan in self.plans
        )
        return SweepResults(self.folder.name, tuple(self.sweep.axes), tuple(found), self.folder, self.differences)

    def rows(self, plan: Plan) -> tuple[dict[str, Any], ...] | None:
        """Return what a cell measured; None unless all of its steps are in the store, and its report is written."""
        store, name = self.orchestrator.store, plan.recipe.name
        if name not in self.known and all(store.is_complete(step.stage, step.fingerprint) for step in plan.steps):
            try:
                folder = run_folder(self.orchestrator.store, plan)
                report: Mapping[str, Any] = json.loads((folder / "report.json").read_text("utf-8"))
                if len(report["steps"]) == len(plan.steps) and (folder / "recipe.json").is_file():
                    self.known[name] = tuple(flat_rows(report))
            except (OSError, ValueError, LookupError, TypeError, AttributeError):
                pass  # it is written again by running the cell
        return self.known.get(name)


class _Processes:
    """Runs cells by `sqft run`, a process for each; those that are left at the end are stopped."""

    def __init__(self, running: _Running, disable: Sequence[str]) -> None:
        self.running, self.disable = running, disable
        self.alive: set[subprocess.Popen[bytes]] = set()
        self.stopped, self.lock = False, Lock()

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.alive:
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
                self.stop()

    def run_one(self, cell: Cell, plan: Plan, device: str) -> None:
        folder, start = self.running.folder / "cells", time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        recipe, said = folder / f"{cell.name}.json", folder / f"{cell.name}.log"
        write_json(recipe, with_absolute_paths(plan.recipe))
        words = ["run", str(recipe), "--store", str(self.running.orchestrator.store.root), "--device", device]
        words += [word for plugin in self.disable for word in ("--disable", plugin)]
        with said.open("wb") as output:
            with self.lock:
                if self.stopped:
                    return
                process = subprocess.Popen([sys.executable, "-m", "sqft", *words], stdout=output, stderr=output)
                self.alive.add(process)
            status = process.wait()
            with self.lock:
                self.alive.discard(process)
        if self.stopped:
            return
        if status:
            self.running.failed(cell, _error_in(said, status))
        else:
            log.info("cell (%s): done in %.0f s on %s", cell, time.monotonic() - start, device)
        self.running.write()


def _error_in(said: Path, status: int) -> str:
    """Return the message with which a process ended, or else how it ended and where its output is."""
    _, found, message = f"\n{said.read_text('utf-8', 'replace')}".rpartition("\nerror: ")
    if status == 2 and found:
        return message.strip()
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"its process {how}; what it printed is in {said}"
