"""What the commands that run recipes share: run, merge and eval."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.cli.output import console, show_table
from sqft.errors import SqftError
from sqft.utils.distributed import mute_unless_main, processes

if TYPE_CHECKING:
    from sqft.execution.orchestrator import Orchestrator
    from sqft.execution.run import Run


def open_orchestrator(store: Path, device: str, disable: tuple[str, ...]) -> tuple[Any, Orchestrator]:
    """Return a console that shows the log, and the orchestrator that runs recipes in `store` on `device`."""
    from sqft.components.registry import Registry
    from sqft.execution.log import log_to_screen
    from sqft.execution.orchestrator import Orchestrator
    from sqft.utils.devices import expose_one_gpu
    from sqft.utils.progress import tracker

    mute_unless_main()
    processes()  # they meet before anything can fail, so that the first to fail is the one that says why
    screen = console()
    log_to_screen(lambda line: screen.print(line, highlight=False, markup=False))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = expose_one_gpu(device)
    return screen, Orchestrator(Registry.discover(disable), store, device, tracker(screen))


def check_output(output: Path | None) -> None:
    """Check that --output, if given, names a folder that is empty or does not exist.

    Raises:
        SqftError: when it does not.
    """
    if output and (output.is_symlink() or output.exists()) and (not output.is_dir() or any(output.iterdir())):
        raise SqftError(f"--output {output} exists and is not an empty folder; name another or empty it")


def print_report(screen: Any, run: Run) -> None:
    """Print the table of what was evaluated, and where the report is."""
    from sqft.execution.report import remarks, table, title

    heads, cells = table(run.report)
    if cells:
        show_table(screen, title(run.report), heads, cells)
    for line in remarks(run.report):
        screen.print(line, highlight=False, markup=False)
    screen.print(f"report: {run.folder / 'report.md'}", highlight=False, markup=False, soft_wrap=True)


def print_result(screen: Any, run: Run, output: Path | None) -> None:
    """Print the report, copy the result with a model card to --output if given, print where it is and how to load it.

    Raises:
        SqftError: when there is nothing to copy, or the copy cannot be written.
    """
    from sqft.execution.run import loading_instructions, loading_template
    from sqft.tools.publishing import write_documents
    from sqft.tools.run_report.facts import read_facts
    from sqft.utils.files import copy_folder

    if not processes().is_main:
        return
    print_report(screen, run)
    result = run.result()
    if result is None:
        screen.print("result: none to load yet; search chooses ranks, merge makes a model", highlight=False)
        if output:
            raise SqftError(f"there is nothing to put into --output {output}; run up to search or merge")
        return
    if output:
        try:
            copy_folder(result, output)
        except OSError as error:
            reason = error.strerror or error
            raise SqftError(f"--output {output} cannot be written: {reason}; the result stays in {result}") from None
        made, result = result, output
        try:
            facts = read_facts(run.folder, run.folder.parents[1])
            write_documents(facts.ending_in(made, loading_template(made, run)), output)
        except (SqftError, OSError) as error:
            screen.print(f"the model is complete, but has no card: {error}", highlight=False, markup=False)
    result = result.resolve()
    # Lines are not broken: they are to be copied.
    screen.print(f"result: {result}", highlight=False, markup=False, soft_wrap=True)
    screen.print(loading_instructions(result, run), highlight=False, markup=False, soft_wrap=True)
