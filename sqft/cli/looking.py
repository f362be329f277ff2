"""Commands that look and run nothing: at a model, a store, this machine."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click

from sqft.cli.group import main
from sqft.cli.options import json_option, store_option
from sqft.cli.output import console, explained, show_table
from sqft.errors import SqftError


@main.command()
@click.argument("model", metavar="MODEL_DIR", type=click.Path(path_type=Path))
@json_option
@explained
def inspect(model: Path, as_json: bool) -> None:
    """Say how sparse the model in MODEL_DIR is and in what precision, layer by layer.

    Floats, GPTQ and compressed-tensors checkpoints, adapters, GGUF files; an artifact's folder will do.
    One tensor is in memory at a time.
    """
    from sqft.tools.inspection import inspect_model
    from sqft.utils.progress import tracker

    found = inspect_model(model, tracker(console(err=True)))
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
        return
    for line in found.lines():
        click.echo(line)
    show_table(console(), str(found.path), *found.table())


@main.command()
@store_option
@json_option
@click.option(
    "--prune",
    is_flag=True,
    help="Delete what no run refers to, and unfinished work that nobody works on; say why the rest stays.",
)
@click.option("--yes", is_flag=True, help="Do not ask before deleting.")
@explained
def status(store: Path, as_json: bool, prune: bool, yes: bool) -> None:
    """Say what a store holds: runs, artifacts, who uses them, and how large they are.

    Delete a run's folder to let go of what it alone uses, then --prune. What an interrupted run would go on
    from is unfinished work.
    """
    from sqft.store import status
    from sqft.store.artifacts import Store
    from sqft.utils.text import human

    held, screen = Store(store), console()
    holdings = status.scan_store(held)
    if not as_json:
        show_table(screen, "runs", *holdings.runs_table())
        show_table(screen, "artifacts", *holdings.artifacts_table())
        click.echo(f"in all: {human(holdings.size)}; --prune would delete {human(status.total(holdings.prunable))}")
    deleted, tried = [], []
    if prune and holdings.prunable:
        for one in holdings.prunable:
            users = f" (run {one.runs[0]} would go on from it)" if one.runs else ""
            click.echo(f"  {one.state} {one.folder}: {human(one.size)}{users}", err=True)
        size = human(status.total(holdings.prunable))
        if yes or _agreed(f"delete these {len(holdings.prunable)} folders, {size} in all?"):
            tried = holdings.prunable
            deleted = status.prune(held, tried)
    if as_json:
        names = [one.folder.name for one in deleted]
        click.echo(json.dumps(holdings.as_json() | ({"deleted": names} if prune else {}), indent=2))
    elif prune:
        click.echo(f"deleted {len(deleted)} folders, {human(status.total(deleted))}")
        for one in status.scan_store(held).artifacts:
            if one.kept or one.folder in [other.folder for other in tried]:
                click.echo(f"kept {one.folder}: {one.kept or 'a run was busy with it a moment ago'}")


def _agreed(question: str) -> bool:
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        raise SqftError("nobody answered, so nothing is deleted; say --yes where nobody can") from None


@main.command()
@store_option
@json_option
@explained
def doctor(store: Path, as_json: bool) -> None:
    """Say what this machine and this installation can do, and what is missing.

    Status 0, or 2 when something that sqft needs is missing or of a version that it does not know.
    """
    from sqft.tools.doctor import checks

    marks, seen, group = {"ok": "ok", "absent": "-", "wrong": "!"}, [], ""
    for check in checks(store):
        seen.append(check)
        if as_json:
            continue
        if check.group != group:
            group = check.group
            click.echo(f"{group}:")
        note = f"  {check.note}" if check.note else ""
        click.echo(f"  {marks[check.state]:2}  {check.name:18}  {check.found}{note}")
    failed = [check for check in seen if check.fails]
    if as_json:
        click.echo(json.dumps({"ok": not failed, "checks": [asdict(check) for check in seen]}, indent=2))
    if failed:
        what = "\n".join(f"  {check.name}: {check.found}; {check.note}" for check in failed)
        click.echo(f"error: what sqft needs is missing or wrong\n{what}", err=True)
        sys.exit(2)
