"""The `sqft` command: the group that holds all commands."""

from __future__ import annotations

import click

import sqft
from sqft.cli.bench import bench
from sqft.cli.data import data
from sqft.cli.doctor import doctor
from sqft.cli.evaluate import evaluate
from sqft.cli.init import init
from sqft.cli.inspect import inspect
from sqft.cli.merge import merge
from sqft.cli.plan import plan
from sqft.cli.plugins import plugins
from sqft.cli.push import push
from sqft.cli.report import report
from sqft.cli.run import run
from sqft.cli.schema import schema
from sqft.cli.show import show
from sqft.cli.status import status
from sqft.cli.sweep import sweep


class Commands(click.Group):
    """A group whose help has the whole summary of each command, where click cuts it at the end of the line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, one.get_short_help_str(limit=1000)) for name, one in sorted(self.commands.items())]
            )


@click.group(cls=Commands)
@click.version_option(sqft.__version__, prog_name="sqft")
def main() -> None:
    """One small, fast model out of a large one: sparse, low-precision, fine-tuned, merged."""


main.add_command(bench)
main.add_command(data)
main.add_command(doctor)
main.add_command(evaluate)
main.add_command(init)
main.add_command(inspect)
main.add_command(merge)
main.add_command(plan)
main.add_command(plugins)
main.add_command(push)
main.add_command(report)
main.add_command(run)
main.add_command(schema)
main.add_command(show)
main.add_command(status)
main.add_command(sweep)
