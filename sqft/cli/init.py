"""`sqft init`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sqft.cli.completion import complete_searcher
from sqft.cli.options import disable_option
from sqft.cli.output import console, report_errors
from sqft.errors import SqftError


def complete_pipeline(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[str]:
    """Complete a pipeline's name."""
    from sqft.tools.presets import PIPELINES

    return [name for name in PIPELINES if name.startswith(incomplete)]


@click.command()
@click.argument("pipeline", required=False, shell_complete=complete_pipeline)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="The recipe's file.  [default: PIPELINE.json]"
)
@click.option("--model", metavar="PATH", help="A folder, a GGUF file or a Hugging Face id.")
@click.option("--data", metavar="PATH", help="A folder with train.jsonl, test.jsonl, …, or a file to train on.")
@click.option("--search", metavar="SEARCHER", shell_complete=complete_searcher, help="Search ranks: hill-climbing, …")
@click.option("--baseline", is_flag=True, help="Also measure the model as it is before.")
@click.option("--answer", metavar="PART", help="What is compared: text (the default), first_number, last_number.")
@click.option("--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run.")
@click.option("--paper", is_flag=True, help="The paper's own choices, also where we measured better ones.")
@disable_option
@report_errors
def init(
    pipeline: str | None,
    output: Path | None,
    model: str | None,
    data: str | None,
    search: str | None,
    baseline: bool,
    answer: str | None,
    trust_remote_code: bool,
    paper: bool,
    disable: tuple[str, ...],
) -> None:
    """Write a recipe to start from, and print what each choice in it means. Without PIPELINE, list them."""
    from sqft.components.registry import Registry
    from sqft.recipe.recipe import Recipe
    from sqft.tools.preset_fit import fit, look_at
    from sqft.tools.presets import (
        DATA,
        GENERAL_TEXT,
        MODEL,
        PIPELINES,
        Choices,
        as_text,
        explanation,
        missing_files,
        starting_recipe,
    )

    if pipeline is None:
        width = max(map(len, PIPELINES))
        for name, preset in PIPELINES.items():
            click.echo(f"{name:{width}}  {preset.summary}")
        return
    if trust_remote_code and not model:
        raise click.UsageError("--trust-remote-code is said of a model; add --model")
    if model and (Path(model) / "adapter_config.json").is_file() and not (Path(model) / "config.json").is_file():
        raise SqftError(f"{model} is an adapter; name the model that it acts on (`sqft eval {model}` measures it)")
    output = output or Path(f"{pipeline}.json")
    registry = Registry.discover(disable)
    searcher: Any = registry.get("searcher", search).component() if search else None
    choices = Choices(searcher, baseline, answer)
    raw = starting_recipe(pipeline, output, model or MODEL, data or DATA, paper, choices)
    if trust_remote_code:
        raw["model"]["trust_remote_code"] = True
    known = unknown = None
    try:
        known = look_at(model, trust_remote_code) if model else None
    except SqftError as error:
        unknown = f"the recipe is not fitted to the model, and its targets are Llama's: {error}"
    if known:
        fit(raw, known, registry)
    recipe = Recipe.parse(raw, output.resolve().parent)
    text = explanation(pipeline, raw, registry)
    try:
        with output.open("x", encoding="utf-8") as stream:
            stream.write(as_text(raw) + "\n")
    except FileExistsError:
        raise SqftError(f"{output} exists, and is not overwritten; name another file with --output") from None
    except OSError as error:
        raise SqftError(f"{output} cannot be written: {error.strerror}") from None
    if sys.stdout.isatty():
        from rich.markdown import Markdown

        console().print(Markdown(text))
    else:
        click.echo(text)
    click.echo(f"written: {output}")
    for path in missing_files(recipe):
        click.echo(f"not there yet: {path}")
    if unknown:
        click.echo(unknown)
    if known and known.codes:
        click.echo("the model came as codes: what prunes and quantizes is left out, and the model itself is measured")
        if raw["finetune"]["merger"] == "qa-sparsepeft":
            click.echo('if it was pruned, add "mask": "codes" to finetune: then every code that means 0 stays so')
    if raw.get("calibration", {}).get("data") == GENERAL_TEXT:
        click.echo("the plan downloads general text to calibrate on, 0.3 GB of C4, unless calibration.data names yours")
    click.echo(f"next: sqft plan {output}")
