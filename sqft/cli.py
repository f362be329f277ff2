"""The commands: parse, call, print.

Exit status 0: done. 2: something the user can mend, in one message. 130: interrupted; the same
command resumes. 1: a bug of sqft, with its traceback.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click

import sqft
from sqft.contracts import KINDS
from sqft.errors import SqftError
from sqft.processes import processes

F = TypeVar("F", bound=Callable[..., Any])


def explained(command: F) -> F:
    """Turn what the user can mend into one message and status 2, and Ctrl-C into a line and 130."""

    @wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except SqftError as error:
            if processes().speaks():
                click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except Exception:
            if processes().speaks():
                raise
            sys.exit(1)
        except KeyboardInterrupt:
            words = shlex.join(["sqft", *_without_fresh(sys.argv[1:])])
            if processes().first:
                click.echo(f"\ninterrupted; finished work is kept. To go on: {words}", err=True)
            sys.exit(130)

    return wrapper  # type: ignore[return-value]


def _without_fresh(words: list[str]) -> list[str]:
    """A command line without --fresh, which would throw away what it made when it is repeated."""
    kept = []
    for before, word in zip(["", *words], words, strict=False):
        if before != "--fresh" and word != "--fresh" and not word.startswith("--fresh="):
            kept.append(word)
    return kept


disable_option = click.option("--disable", multiple=True, metavar="PLUGIN", help="Skip a plugin (repeatable).")
store_option = click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("store"),
    show_default=True,
    help="Folder of artifacts and runs.",
)
set_option = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="PATH=VALUE",
    help="Change the recipe (repeatable): sparsify.sparsity=0.6",
)
recipe_argument = click.argument("recipe", type=click.Path(dir_okay=False, path_type=Path))


@click.group()
@click.version_option(sqft.__version__, prog_name="sqft")
def main() -> None:
    """One small, fast model out of a large one: sparse, low-precision, fine-tuned, merged."""


@main.command()
@recipe_argument
@set_option
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--fresh", metavar="STAGE", help="Make this stage, and all that follows from it, again.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, …")
@store_option
@click.option("--output", type=click.Path(path_type=Path), help="Also put the finished model or adapter here.")
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
    from rich.console import Console

    from sqft.orchestrator import Orchestrator
    from sqft.progress import tracker
    from sqft.registry import Registry

    if output and (output.is_symlink() or output.exists()) and (not output.is_dir() or any(output.iterdir())):
        raise SqftError(f"--output {output} exists and is not an empty folder; name another or empty it")
    console = Console(soft_wrap=not sys.stdout.isatty())
    _log_to(console.print)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    device = _only_gpu(device)
    orchestrator = Orchestrator(Registry.discover(disable), store, device, tracker(console))
    finished = orchestrator.run(orchestrator.load(recipe, changes), until, fresh)
    if not processes().first:
        return
    _show_table(console, finished.report)
    console.print(f"report: {finished.folder / 'report.md'}", highlight=False, markup=False)
    result = finished.result()
    if result is None:
        console.print("result: none to load yet; search chooses ranks, merge makes a model", highlight=False)
        if output:
            raise SqftError(f"there is nothing to put into --output {output}; run on to search or merge")
        return
    if output:
        _copy(result, output)
        result = output
    result = result.resolve()
    console.print(f"result: {result}", highlight=False, markup=False)
    console.print(_how_to_load(result), highlight=False, markup=False)


@main.command()
@recipe_argument
@set_option
@store_option
@disable_option
@explained
def plan(recipe: Path, changes: tuple[str, ...], store: Path, disable: tuple[str, ...]) -> None:
    """Check RECIPE and print its steps: what runs, what is reused, estimates. Loads no model."""
    from sqft.orchestrator import Orchestrator
    from sqft.registry import Registry

    click.echo(str(Orchestrator(Registry.discover(disable), store).load(recipe, changes)))


@main.command()
@click.argument("recipes", nargs=-1, required=True, type=click.Path(dir_okay=False, path_type=Path))
@set_option
@store_option
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Turns each recipe takes.")
@click.option("--steps", type=click.IntRange(min=2), default=8, show_default=True, help="Training steps a turn.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@explained
def bench(
    recipes: tuple[Path, ...], changes: tuple[str, ...], store: Path, rounds: int, steps: int, as_json: bool
) -> None:
    """Compare RECIPES that fine-tune: storage, speed, memory and accuracy, with ratios to the first.

    Recipes that have not been run are run first. Served on the CPU, in bfloat16.
    """
    from sqft.bench import HEADS, bench, table

    with redirect_stdout(sys.stderr):  # only the table is output
        rows = bench(recipes, changes, store, rounds, steps, lambda line: click.echo(line, err=True))
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    for line in (HEADS, ["---"] * len(HEADS), *table(rows)):
        click.echo("| " + " | ".join(line) + " |")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@disable_option
@explained
def plugins(as_json: bool, disable: tuple[str, ...]) -> None:
    """List every installed component and every plugin that is broken."""
    from sqft.registry import Registry

    registry = Registry.discover(disable)
    rows = [
        {
            "kind": entry.component.kind,
            "name": entry.component.name,
            "plugin": entry.provider.plugin,
            "provider": entry.provider.source,
            "summary": _summary(entry.component),
        }
        for entry in registry.entries()
    ]
    rows += [
        {"kind": "broken", "name": b.plugin, "plugin": b.plugin, "provider": b.source, "summary": b.reason}
        for b in registry.broken()
    ]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    heads = ("kind", "name", "provider", "summary")
    lines = [[head.upper() for head in heads], *([row[head] for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads) - 1)] + [0]
    for line in lines:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@main.command()
@click.argument("kind", type=click.Choice(list(KINDS)))
@click.argument("name")
@disable_option
@explained
def show(kind: str, name: str, disable: tuple[str, ...]) -> None:
    """Help of one component: what it does, its options with defaults and ranges."""
    import inspect

    from sqft.registry import Registry
    from sqft.schema import option_lines

    entry = Registry.discover(disable).get(kind, name)
    click.echo(f"{kind} {entry.component.name}, offered by {entry.provider}\n")
    click.echo(inspect.getdoc(entry.component) or "(no description)")
    click.echo("\noptions:" if entry.component.model_fields else "\nno options")
    for line in option_lines(entry.component):
        click.echo(f"  {line}")


@main.command()
@disable_option
@explained
def schema(disable: tuple[str, ...]) -> None:
    """Print the JSON Schema of a recipe, with the options of every installed plugin."""
    from sqft.registry import Registry
    from sqft.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(Registry.discover(disable)), indent=2))


def _summary(component: type[Any]) -> str:
    return (component.__doc__ or "").strip().partition("\n")[0]


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


def _how_to_load(result: Path) -> str:
    if (result / "adapter_config.json").is_file():
        base = Path(json.loads((result / "adapter_config.json").read_text())["base_model_name_or_path"])
        where = f'"{base.parent}", gguf_file="{base.name}"' if base.suffix == ".gguf" else f'"{base}"'
        model = f'AutoModelForCausalLM.from_pretrained({where}, dtype="auto")'
        return (
            "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
            f'model = PeftModel.from_pretrained({model}, "{result}")'
        )
    config = result / "config.json"
    if config.is_file() and "quantization_config" in json.loads(config.read_text("utf-8")):
        return (
            "a GPTQ checkpoint; with gptqmodel and optimum installed:\n"
            "from transformers import AutoModelForCausalLM\n"
            f'model = AutoModelForCausalLM.from_pretrained("{result}")'
        )
    if (result / "sqft_adapter.json").is_file():
        return 'this adapter acts only through its mask; add "merge": {} to the recipe to get a model'
    return (
        "from transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("{result}", dtype="auto")'
    )


def _show_table(console: Any, report: dict[str, Any]) -> None:
    """The report's table: drawn on a terminal, folded where that is narrow, and Markdown anywhere else."""
    from rich.markup import escape
    from rich.table import Column, Table

    from sqft.report import report_markdown, table

    heads, cells = table(report)
    if not cells:
        return
    if not console.is_terminal:
        console.print(f"\n{report_markdown(report)}", highlight=False, markup=False)
        return
    shown = Table(*(Column(head, overflow="fold") for head in heads))
    for row in cells:
        shown.add_row(*map(escape, row))
    console.print(shown)


def _log_to(echo: Callable[..., None]) -> None:
    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            prefix = "warning: " if record.levelno >= logging.WARNING else ""
            echo(f"{prefix}{record.getMessage()}", highlight=False, markup=False)

    logger = logging.getLogger("sqft")
    logger.handlers = [Handler()]
    logger.setLevel(logging.INFO)
    logger.propagate = False
