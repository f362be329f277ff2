"""Commands that run a recipe, or would."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from sqft.cli.group import main
from sqft.cli.options import disable_option, json_option, set_option, store_option
from sqft.cli.output import console, explained, show_table
from sqft.errors import SqftError
from sqft.utils.distributed import processes

if TYPE_CHECKING:
    from sqft.execution.orchestrator import Orchestrator, Run

recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))
device_option = click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
output_option = click.option(
    "--output", type=click.Path(path_type=Path), help="Also put the finished model or adapter here."
)


def _runs(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What a shell may complete a run to: the names in the store, or else a path."""
    runs = Path(context.params.get("store") or "store") / "runs"
    names = sorted(file.parent.name for file in runs.glob("*/recipe.json") if file.parent.name.startswith(incomplete))
    return [CompletionItem(name) for name in names] or [CompletionItem(incomplete, type="file")]


@main.command()
@recipe_argument
@set_option
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--fresh", metavar="STAGE", help="Make this stage, and all that follows from it, again.")
@device_option
@store_option
@output_option
@disable_option
@explained
def run(
    recipe: Path,
    changes: tuple[str, ...],
    until: str | None,
    fresh: str | None,
    device: str,
    store: Path,
    output: Path | None,
    disable: tuple[str, ...],
) -> None:
    """Run RECIPE: reuse what is done, do what is not, print what was gained."""
    _check_output(output)
    screen, orchestrator = _ready(store, device, disable)
    _finish(screen, orchestrator.run(orchestrator.load(recipe, changes), until, fresh), output)


@main.command()
@click.argument("run", metavar="RUN", shell_complete=_runs)
@set_option
@device_option
@store_option
@output_option
@disable_option
@explained
def merge(
    run: str, changes: tuple[str, ...], device: str, store: Path, output: Path | None, disable: tuple[str, ...]
) -> None:
    """Run the recipe of RUN, which the store keeps, to the merge. Its own file is not needed.

    RUN is a folder of store/runs, its name, or the recipe's name, of which the newest run is taken.
    """
    from sqft.recipe.rerun import find_run

    _check_output(output)
    folder, store = find_run(run, store)
    screen, orchestrator = _ready(store, device, disable)
    _finish(
        screen, orchestrator.run(orchestrator.load(folder / "recipe.json", ["merge={}", *changes]), "merge"), output
    )


@main.command("eval")
@click.argument("subject", metavar="RUN_OR_MODEL", shell_complete=_runs)
@click.option("--of", multiple=True, metavar="STAGE", help="What to measure (repeatable).  [default: what stands]")
@click.option("--tasks", metavar="A,B", help="lm-eval tasks.")
@click.option("--perplexity", type=click.Path(path_type=Path), metavar="FILE", help="A text.")
@click.option("--exact-match", type=click.Path(path_type=Path), metavar="FILE", help="Records with right answers.")
@set_option
@device_option
@store_option
@disable_option
@explained
def evaluate(
    subject: str,
    of: tuple[str, ...],
    tasks: str | None,
    perplexity: Path | None,
    exact_match: Path | None,
    changes: tuple[str, ...],
    device: str,
    store: Path,
    disable: tuple[str, ...],
) -> None:
    """Measure what stands of a run, as its recipe does or as the options say; or a model's folder.

    RUN_OR_MODEL is a folder of store/runs, its name, the recipe's name, a model's folder, or a GGUF file.
    STAGE is model, sparsify, quantize, search, merge, or finetune:NAME; what of it is not made yet is made.
    """
    from sqft.recipe.reading import read_json
    from sqft.recipe.recipe import Recipe
    from sqft.recipe.rerun import completed_steps, evaluation_overrides, find_run, recipe_of_model

    measures: dict[str, Any] = {"tasks": [task.strip() for task in tasks.split(",")]} if tasks else {}
    measures |= {"perplexity": {"text": str(perplexity.resolve())}} if perplexity else {}
    measures |= {"exact_match": {"data": str(exact_match.resolve())}} if exact_match else {}
    place = Path(subject)
    if place.exists() and not (place / "recipe.json").is_file():
        raw, source = recipe_of_model(place), subject
    else:
        folder, store = find_run(subject, store)
        raw, source = read_json(folder / "recipe.json"), str(folder / "recipe.json")
    screen, orchestrator = _ready(store, device, disable)
    of = of or tuple(completed_steps(raw, lambda recipe: orchestrator.plan(recipe).reused))
    if not of:
        raise SqftError(f"no step of {subject} stands that could be measured; run its recipe, or say --of what")
    recipe = Recipe.changed(raw, [*evaluation_overrides(raw, of, measures), *changes], source=source)
    _show(screen, orchestrator.run(orchestrator.plan(recipe)))


@main.command()
@recipe_argument
@set_option
@store_option
@disable_option
@explained
def plan(recipe: Path, changes: tuple[str, ...], store: Path, disable: tuple[str, ...]) -> None:
    """Check RECIPE and print its steps: what runs, what is reused, estimates. Loads no model."""
    from sqft.components.registry import Registry
    from sqft.execution.orchestrator import Orchestrator

    click.echo(str(Orchestrator(Registry.discover(disable), store).load(recipe, changes)))


@main.command()
@recipe_argument
@set_option
@click.option("--section", "sections", multiple=True, metavar="SECTION", help="Show only what is in it (repeatable).")
@click.option("--examples", type=click.IntRange(min=0), default=2, show_default=True, help="How many of each to show.")
@json_option
@store_option
@disable_option
@explained
def data(
    recipe: Path,
    changes: tuple[str, ...],
    sections: tuple[str, ...],
    examples: int,
    as_json: bool,
    store: Path,
    disable: tuple[str, ...],
) -> None:
    """Show RECIPE's data as the model will see them. What it learns from stands between ⟪ and ⟫.

    SECTION is a place of the recipe: calibration, finetune, finetune.validation, evaluate.exact_match, …
    """
    from dataclasses import asdict

    from rich.text import Text

    from sqft.components.registry import Registry
    from sqft.execution.orchestrator import Orchestrator
    from sqft.tools.data_preview import previews

    found = previews(Orchestrator(Registry.discover(disable), store).load(recipe, changes), examples, sections)
    if as_json:
        click.echo(json.dumps([asdict(preview) for preview in found], indent=2, ensure_ascii=False))
        return
    screen, nothing = console(), True
    for preview in found:
        nothing = False
        screen.print(Text(preview.place, "bold"))
        for name, said in preview.facts.items():
            screen.print(f"  {name}: {said}", markup=False, highlight=False)
        for pieces in preview.examples:
            shown = [(_shortened(p.text), p.learned) for p in pieces]
            marked = [("⟪" + text + "⟫", "bold green") if learned else (text, "dim") for text, learned in shown]
            screen.print(Text.assemble(*marked), "")
    if nothing:
        screen.print("this recipe reads no data")


@main.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@set_option
@store_option
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns each recipe takes.")
@click.option("--steps", type=click.IntRange(min=2), default=8, show_default=True, help="Training steps a turn.")
@json_option
@explained
def bench(
    recipes: tuple[Path, ...], changes: tuple[str, ...], store: Path, rounds: int, steps: int, as_json: bool
) -> None:
    """Compare RECIPES that fine-tune: storage, speed, memory and accuracy, with ratios to the first.

    Recipes that have not been run are run first. Served on the CPU, in bfloat16.
    """
    from sqft.tools.bench import HEADS, bench, table

    with redirect_stdout(sys.stderr):  # only the table is output
        rows = bench(recipes, changes, store, rounds, steps, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for line in (HEADS, ["---"] * len(HEADS), *table(rows)):
        click.echo("| " + " | ".join(line) + " |")


def _shortened(text: str, most: int = 2000) -> str:
    """A text that fits on a screen; `--json` has all of it."""
    left = len(text) - most
    return text if left <= 0 else f"{text[: most // 2]} [… {left} characters …] {text[-most // 2 :]}"


def _check_output(output: Path | None) -> None:
    if output and (output.is_symlink() or output.exists()) and (not output.is_dir() or any(output.iterdir())):
        raise SqftError(f"--output {output} exists and is not an empty folder; name another or empty it")


def _ready(store: Path, device: str, disable: tuple[str, ...]) -> tuple[Any, Orchestrator]:
    """A screen that shows the log, and what runs recipes."""
    from sqft.components.registry import Registry
    from sqft.execution.orchestrator import Orchestrator
    from sqft.utils.progress import tracker

    screen = console()
    _log_to(screen.print)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = _only_gpu(device)
    return screen, Orchestrator(Registry.discover(disable), store, device, tracker(screen))


def _show(screen: Any, finished: Run) -> None:
    from sqft.execution.report import table, title

    heads, cells = table(finished.report)
    if cells:
        show_table(screen, title(finished.report), heads, cells)
    screen.print(f"report: {finished.folder / 'report.md'}", highlight=False, markup=False)


def _finish(screen: Any, finished: Run, output: Path | None) -> None:
    """The table, and where the model is that was made."""
    if not processes().is_main:
        return
    _show(screen, finished)
    result = finished.result()
    if result is None:
        screen.print("result: none to load yet; search chooses ranks, merge makes a model", highlight=False)
        if output:
            raise SqftError(f"there is nothing to put into --output {output}; run on to search or merge")
        return
    if output:
        _copy(result, output)
        result = output
    result = result.resolve()
    screen.print(f"result: {result}", highlight=False, markup=False)
    screen.print(_how_to_load(result, finished), highlight=False, markup=False)


def _copy(result: Path, output: Path) -> None:
    """Copy whole or not at all."""
    partial = output.with_name(f".{output.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(result, partial)
        if output.is_dir():
            output.resolve().rmdir()
        os.replace(partial, output.resolve())
    except (OSError, shutil.Error) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise SqftError(f"--output {output} cannot be written: {reason}; the result stays in {result}") from None


def _only_gpu(device: str) -> str:
    """Hide all GPUs but the one that is named, before torch looks: Trainer would spread over all it sees."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    index = index or os.environ.get("LOCAL_RANK", "")  # of several processes, each has its own
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = visible.split(",") if visible is not None else None
    number = int(index) if index.isdecimal() else 0
    if index and not index.isdecimal():
        raise SqftError(f"--device {device}: write cuda or cuda:N")
    if shown is not None and number >= len(shown):
        raise SqftError(f"--device {device}: CUDA_VISIBLE_DEVICES shows {len(shown)} device(s)")
    os.environ["CUDA_VISIBLE_DEVICES"] = shown[number] if shown else index or "0"
    return "cuda"


def _how_to_load(result: Path, run: Run) -> str:
    if (result / "adapter_config.json").is_file():
        base = run.plan.adapter_base.model(run.inputs("search")).resolve()
        where = f'"{base.parent}", gguf_file="{base.name}"' if base.suffix == ".gguf" else f'"{base}"'
        model = f'AutoModelForCausalLM.from_pretrained({where}, dtype="auto")'
        return (
            "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
            f'model = PeftModel.from_pretrained({model}, "{result}")'
        )
    config = result / "config.json"
    if config.is_file() and (settings := json.loads(config.read_text("utf-8")).get("quantization_config")):
        format = settings.get("quant_method")
        name, reader = ("GPTQ", "gptqmodel and optimum") if format == "gptq" else (format, format)
        return (
            f"a {name} checkpoint; with {reader} installed:\n"
            "from transformers import AutoModelForCausalLM\n"
            f'model = AutoModelForCausalLM.from_pretrained("{result}")'
        )
    if (result / "sqft_adapter.json").is_file():
        return 'this adapter acts only through its mask; add "merge": {} to the recipe to get a model'
    return (
        "from transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("{result}", dtype="auto")'
    )


def _log_to(echo: Callable[..., None]) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            echo(f"{prefix}{record.getMessage()}", highlight=False, markup=False)

    logger = logging.getLogger("sqft")
    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
