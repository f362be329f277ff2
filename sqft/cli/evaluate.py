"""`sqft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sqft.cli.completion import complete_evaluable, complete_run
from sqft.cli.options import device_option, disable_option, set_option, store_option
from sqft.cli.output import report_errors
from sqft.cli.running import open_orchestrator, print_report
from sqft.errors import HubError, SqftError, StoreError


@click.command("eval")
@click.argument("subject", metavar="RUN_OR_MODEL", shell_complete=complete_run)
@click.option(
    "--of",
    multiple=True,
    metavar="STAGE",
    shell_complete=complete_evaluable,
    help="What to measure (repeatable).  [default: all that is made]",
)
@click.option("--tasks", metavar="A,B", help="lm-eval tasks.")
@click.option(
    "--perplexity", multiple=True, type=click.Path(path_type=Path), metavar="FILE", help="A text (repeatable)."
)
@click.option("--exact-match", type=click.Path(path_type=Path), metavar="FILE", help="Records with right answers.")
@set_option
@device_option
@store_option
@disable_option
@report_errors
def evaluate(
    subject: str,
    of: tuple[str, ...],
    tasks: str | None,
    perplexity: tuple[Path, ...],
    exact_match: Path | None,
    changes: tuple[str, ...],
    device: str,
    store: Path,
    disable: tuple[str, ...],
) -> None:
    """Measure the models that a run has made, as its recipe or the options say; or a model.

    RUN_OR_MODEL is a folder of store/runs, its name, the recipe's name; a model's folder, a GGUF file, or a Hugging
    Face id; or the folder or id of a PEFT adapter, which is measured on its base model (--set model.path=BASE names
    another).
    STAGE is model, sparsify, quantize, search, merge, or finetune:NAME; a step that is missing for it is run.
    """
    from sqft.execution.earlier_runs import remade_note
    from sqft.recipe.recipe import Recipe
    from sqft.recipe.rerun import completed_steps, evaluation_overrides

    measures: dict[str, Any] = {"tasks": [task.strip() for task in tasks.split(",")]} if tasks else {}
    texts = [{"text": str(text.resolve())} for text in perplexity]
    measures |= {"perplexity": texts if len(texts) > 1 else texts[0]} if texts else {}
    measures |= {"exact_match": {"data": str(exact_match.resolve())}} if exact_match else {}
    raw, source, store = _recipe_of(subject, store, changes)
    screen, orchestrator = open_orchestrator(store, device, disable)
    of = of or tuple(completed_steps(raw, lambda recipe: orchestrator.plan(recipe).reused))
    if not of:
        plan = orchestrator.plan(Recipe.parse({**raw, "evaluate": None, "export": []}, source=source))
        note = remade_note(orchestrator.store, plan.recipe, plan.steps)
        raise SqftError(
            f"no step of {subject} that could be measured is done; run its recipe, or name one with --of"
            + (f"\n  Its steps are {note}" if note else "")
        )
    recipe = Recipe.changed(raw, [*evaluation_overrides(raw, of, measures), *changes], source=source)
    print_report(screen, orchestrator.run(orchestrator.plan(recipe)))


def _recipe_of(subject: str, store: Path, changes: tuple[str, ...]) -> tuple[dict[str, Any], str, Path]:
    """Return the recipe of what is to be measured, where it comes from, and its store: a model or an adapter that is
    here, else a run, else what the hub has."""
    from sqft.recipe.reading import read_json
    from sqft.recipe.rerun import recipe_of_model
    from sqft.store.runs import find_run
    from sqft.utils.hub import is_hub_id, not_asked

    path = Path(subject)
    if path.exists() and not (path / "recipe.json").is_file():
        return recipe_of_model(subject, changes), subject, store
    try:
        folder, store = find_run(subject, store)
    except StoreError as no_run:
        if not is_hub_id(subject, path):
            raise StoreError(f"{no_run}{not_asked(subject, path)}") from None
        try:
            return recipe_of_model(subject, changes), subject, store
        except HubError as error:  # it may be a misspelt run
            raise HubError(f"{error}\n  And {no_run}") from None
    return read_json(folder / "recipe.json"), str(folder / "recipe.json"), store
