"""`sqft push`."""

from __future__ import annotations

from pathlib import Path

import click

from sqft.cli.completion import complete_run
from sqft.cli.options import store_option
from sqft.cli.output import report_errors


@click.command()
@click.argument("run", metavar="RUN", shell_complete=complete_run)
@click.argument("repo", metavar="OWNER/NAME")
@click.option("--public", is_flag=True, help="A new repository is public.  [default: private]")
@store_option
@report_errors
def push(run: str, repo: str, public: bool, store: Path) -> None:
    """Upload the result of RUN to the Hugging Face hub, with a model card, its recipe and its report.

    An adapter that stays beside its base is uploaded if that base is a model of the hub, as it is there.
    RUN is a folder of store/runs, its name, or the recipe's name (then its newest run is taken). huggingface_hub
    finds the token (`hf auth login`, or HF_TOKEN).
    """
    from sqft.store.runs import find_run
    from sqft.tools.publishing import push as upload
    from sqft.tools.run_report.facts import read_facts

    click.echo(f"uploaded: {upload(read_facts(*find_run(run, store)), repo, public)}")
