"""`sqft data`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sqft.cli.completion import complete_data
from sqft.cli.options import disable_option, json_option, recipe_argument, set_option, store_option
from sqft.cli.output import console, report_errors


@click.command()
@recipe_argument
@set_option
@click.option(
    "--section",
    "sections",
    multiple=True,
    metavar="SECTION",
    shell_complete=complete_data,
    help="Show only this section (repeatable).",
)
@click.option(
    "--examples", type=click.IntRange(min=0), default=2, show_default=True, help="How many examples of each to show."
)
@json_option
@store_option
@disable_option
@report_errors
def data(
    recipe: Path,
    changes: tuple[str, ...],
    sections: tuple[str, ...],
    examples: int,
    as_json: bool,
    store: Path,
    disable: tuple[str, ...],
) -> None:
    """Show RECIPE's data as the model will see them. The text that it learns from is between ⟪ and ⟫.

    SECTION is a path inside the recipe: calibration, finetune, finetune.validation, evaluate.exact_match, …
    """
    from dataclasses import asdict

    from rich.text import Text

    from sqft.components.registry import Registry
    from sqft.execution.orchestrator import Orchestrator
    from sqft.tools.data_preview import previews

    shown = previews(Orchestrator(Registry.discover(disable), store).load(recipe, changes), examples, sections)
    if as_json:
        click.echo(json.dumps([asdict(preview) for preview in shown], indent=2, ensure_ascii=False))
        return
    screen, empty = console(), True
    for preview in shown:
        empty = False
        screen.print(Text(preview.place, "bold"))
        for name, value in preview.facts.items():
            screen.print(f"  {name}: {value}", markup=False, highlight=False)
        for note in preview.notes:
            screen.print(Text(f"  note: {note}", "yellow"))
        for number, pieces in enumerate(preview.examples):
            if preview.titles:
                screen.print(Text(f"— {preview.titles[number]} —", "cyan"))
            texts = [(_shortened(piece.text), piece.learned) for piece in pieces]
            marked = [("⟪" + text + "⟫", "bold green") if learned else (text, "dim") for text, learned in texts]
            screen.print(Text.assemble(*marked), "")
    if empty:
        screen.print("this recipe reads no data")


def _shortened(text: str, most: int = 2000) -> str:
    """Cut the middle out of a text that is too long for a screen; `--json` prints all of it."""
    left = len(text) - most
    return text if left <= 0 else f"{text[: most // 2]} [… {left} characters …] {text[-most // 2 :]}"
