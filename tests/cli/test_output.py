"""What commands print: errors as one message with a status, and tables for a terminal or for a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable

import pytest
from rich.console import Console

from sqft.cli.output import report_errors, show_table, without_fresh
from sqft.errors import DataError
from sqft.utils.distributed import Processes


def raises(error: BaseException) -> Callable[[], None]:
    @report_errors
    def command() -> None:
        """Do something."""
        raise error

    return command


def test_an_error_that_a_user_can_fix(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        raises(DataError("d.jsonl:2: not valid JSON"))()
    assert ended.value.code == 2 and capsys.readouterr().err == "error: d.jsonl:2: not valid JSON\n"


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        raises(ZeroDivisionError())()


def test_an_interruption_says_how_to_go_on(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/sqft", "run", "my recipe.json", "--fresh", "search"])
    with pytest.raises(SystemExit) as ended:
        raises(KeyboardInterrupt())()
    assert ended.value.code == 130
    assert capsys.readouterr().err.endswith("To continue: sqft run 'my recipe.json'\n")


@pytest.mark.parametrize(("error", "status"), [(DataError("x"), 2), (ValueError("x"), 1), (KeyboardInterrupt(), 130)])
def test_a_process_that_is_not_to_report_is_silent(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int
) -> None:
    other = Processes(1, 2)
    monkeypatch.setattr(Processes, "should_report", lambda _: False)
    monkeypatch.setattr("sqft.cli.output.met_processes", lambda: other)
    with pytest.raises(SystemExit) as ended:
        raises(error)()
    captured = capsys.readouterr()
    assert ended.value.code == status and captured.err == captured.out == ""


def test_a_command_keeps_its_name_and_help() -> None:
    assert (raises(ValueError()).__name__, raises(ValueError()).__doc__) == ("command", "Do something.")


@pytest.mark.parametrize(
    ("words", "kept"),
    [
        (["run", "r.json"], ["run", "r.json"]),
        (["run", "r.json", "--fresh", "sparsify", "--fresh", "merge"], ["run", "r.json"]),
        (["run", "--fresh=search", "r.json", "--until", "merge"], ["run", "r.json", "--until", "merge"]),
    ],
)
def test_what_would_start_anew_is_left_out(words: list[str], kept: list[str]) -> None:
    assert without_fresh(words) == kept


def printed(terminal: bool, width: int) -> str:
    stream = io.StringIO()
    screen = Console(file=stream, force_terminal=terminal, width=width, soft_wrap=not terminal, no_color=True)
    show_table(screen, "Runs", ["name", "value"], [["[bold]a", "x" * 50]])
    return stream.getvalue()


def test_a_table_in_a_file_is_markdown_in_one_line_each() -> None:
    assert printed(False, 20).strip().endswith(f"| \\[bold]a | {'x' * 50} |") and "# Runs" in printed(False, 20)


def test_a_table_on_a_terminal_wraps_its_cells_and_prints_them_as_they_are() -> None:
    text = printed(True, 30)
    assert "[bold]a" in text and text.count("x") == 50 and all(line.endswith("│") for line in text.splitlines()[3:-1])


@pytest.mark.parametrize("width", [40, 60, 80, 100, 200])
def test_no_word_is_broken_and_no_column_is_empty(width: int) -> None:
    heads = ["configuration", "accuracy", "perplexity", "sparsity", "trained", "adds on disk", "made in", "peak memory"]
    cells = [
        ["sparsify", "48.5% ± 3.5%", "262.41", "50.00%", "–", "65 KiB", "1 s", "429 MiB"],
        ["search (hill-climbing)", "0.0% ± 0.0%", "262.44", "50.00%", "–", "27 KiB", "–", "552 MiB"],
    ]
    out = io.StringIO()
    show_table(Console(file=out, force_terminal=True, color_system=None, width=width), "t", heads, cells)
    shown = out.getvalue()
    assert all(len(line) <= width for line in shown.splitlines()) and "trained" not in shown
    for text in (*" ".join(heads).replace("trained ", "").split(), *cells[0][:4], *cells[1][:3]):
        assert text in shown, text
    assert (shown.count("sparsify") == 1) is (width >= 120)
    assert shown.index("accuracy") < shown.index("peak")


def test_a_sentence_in_a_cell_may_wrap() -> None:
    out = io.StringIO()
    sentence = "the manifest of this artifact does not say which files it has, so it cannot be used"
    show_table(Console(file=out, force_terminal=True, color_system=None, width=60), "t", ["a", "b"], [["x", sentence]])
    assert out.getvalue().count("┏") == 1 and "manifest" in out.getvalue()
