"""`sqft show`."""

from __future__ import annotations

from click.testing import CliRunner

from sqft.cli import main


def test_options_are_shown_with_ranges_and_defaults() -> None:
    shown = CliRunner().invoke(main, ["show", "searcher", "hill-climbing"])
    assert "turns: whole number, at least 1; default 3; T of Algorithm 1" in shown.output
    wrong = CliRunner().invoke(main, ["show", "scorer", "wnda"])
    assert wrong.exit_code == 2 and "Did you mean 'wanda'?" in wrong.output


def test_a_kind_lists_its_components() -> None:
    shown = CliRunner().invoke(main, ["show", "exporter"])
    names = [line.partition(":")[0] for line in shown.output.splitlines()]
    assert shown.exit_code == 0 and {"gguf", "hf", "mlx"} <= set(names) and "wanda" not in names
    assert "mlx: A folder for mlx_lm." in shown.output


def test_a_kind_that_is_none() -> None:
    done = CliRunner().invoke(main, ["show", "scorers", "wanda"])
    assert done.exit_code == 2 and "kinds: scorer, allocator" in done.stderr
