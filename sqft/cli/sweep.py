"""`sqft sweep`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sqft.cli.options import disable_option, set_option, store_option
from sqft.cli.output import report_errors, show_table
from sqft.cli.running import open_orchestrator


@click.command()
@click.argument("sweep", type=click.Path(dir_okay=False, path_type=Path))
@set_option
@click.option("--plan", "only_plan", is_flag=True, help="Check all cells and say what there is to do. Runs nothing.")
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=("cpu",),
    show_default="cpu",
    help="cpu, cuda:1, … Repeat it to run cells side by side, at most one on each.",
)
@store_option
@disable_option
@report_errors
def sweep(
    sweep: Path,
    changes: tuple[str, ...],
    only_plan: bool,
    devices: tuple[str, ...],
    store: Path,
    disable: tuple[str, ...],
) -> None:
    """Run a recipe with every combination of some settings, as SWEEP says: seeds, sparsities, pipelines, any setting.

    Each combination, a cell, is a run in the store. Steps that cells share are made once, and what is done is not done
    again. A cell that fails does not stop the others; the status is then 2. Prints a table of means over seeds, and
    writes all figures to sweeps/NAME in the store: results.csv, results.json and report.md.
    """
    from sqft.errors import SqftError
    from sqft.tools.sweep import DIFFERENCE_HEADS, Sweep, plan_cells, run_sweep
    from sqft.utils.distributed import processes

    if processes().count > 1:
        raise SqftError("sqft sweep starts processes itself: call it without torchrun, with --device for each device")
    found = Sweep.load(sweep)
    here, beside = (devices[0], ()) if len(devices) == 1 else ("cpu", devices)
    screen, orchestrator = open_orchestrator(store, here, disable)
    plans = plan_cells(found, orchestrator, changes)
    if only_plan:
        steps = {step.fingerprint: step.name in plan.reused for _, plan in plans for step in plan.steps}
        total, done = sum(len(plan.steps) for _, plan in plans), sum(steps.values())
        screen.print(f"{len(plans)} cells, {total} steps: {len(steps)} different ones, of which {done} are done")
        for cell, plan in plans:
            missing = [step.name for step in plan.steps if step.name not in plan.reused]
            screen.print(f"{cell}: {', '.join(missing) or 'done'}", highlight=False, markup=False)
        return
    results = run_sweep(found, orchestrator, plans, beside, disable, changes)
    show_table(screen, found.name, *results.table())
    if results.differences:
        cells = [one.cells() for one in results.differences]
        show_table(screen, "On the same questions", DIFFERENCE_HEADS, cells)
    screen.print(f"results: {results.folder}", highlight=False, markup=False)
    if results.failed:
        names = "; ".join(f"({one.cell})" for one in results.failed)
        screen.print(f"{len(results.failed)} of {len(results.cells)} cells failed: {names}", markup=False)
        sys.exit(2)
