"""The log of a run: a file that keeps tracebacks, and lines on the screen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from sqft.execution.log import log_to_file, log_to_screen

log = logging.getLogger("sqft")


@pytest.fixture(autouse=True)
def logger() -> Iterator[None]:
    """Put the logger back as it was."""
    handlers, level, propagate = log.handlers, log.level, log.propagate
    yield
    log.handlers, log.propagate = handlers, propagate
    log.setLevel(level)


def test_what_is_logged_inside_is_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "run.log"
    with log_to_file(file, nullcontext):
        log.info("a step")
        logging.getLogger("other").warning("not of sqft")
    log.info("afterwards")
    (line,) = file.read_text().splitlines()
    assert line.endswith(" INFO a step")
    with log_to_file(file, nullcontext):
        log.info("again")
    assert len(file.read_text().splitlines()) == 2, "a second run adds to it"


@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), SystemExit(3)])
def test_the_file_keeps_the_traceback(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)), log_to_file(tmp_path / "run.log", nullcontext, logging.ERROR):
        log.info("only errors are kept here")
        raise error
    text = (tmp_path / "run.log").read_text()
    assert "ERROR stopped\nTraceback" in text and "only errors" not in text


def test_a_full_disk_cuts_it_short_without_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full, a device that is always full")
    with log_to_file(Path("/dev/full"), nullcontext):
        log.info("a step")
    assert not capfd.readouterr().err


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"), log_to_file(tmp_path / "no" / "run.log", nullcontext):
        pass


def test_the_screen_shows_lines(caplog: pytest.LogCaptureFixture) -> None:
    lines: list[str] = []
    log_to_screen(lines.append)
    log_to_screen(lines.append)  # the second replaces the first
    log.debug("hidden")
    log.info("[1/2] sparsify")
    log.warning("odd: %s", "data")
    assert lines == ["[1/2] sparsify", "warning: odd: data"] and not caplog.messages
