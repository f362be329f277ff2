"""What a long step shows: lines with the time left where there is no terminal, bars where there is one."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest
from rich.console import Console

from sqft.utils import progress
from sqft.utils.progress import silent, tracker


class Clock:
    """Time that passes only when a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def lines(console: Console) -> list[str]:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=60)


def test_a_line_now_and_then_with_the_time_left(console: Console, clock: Clock) -> None:
    seen = []
    for item in tracker(console)("abcdefgh", "scoring"):
        seen.append(item)
        clock.now += 10
    assert "".join(seen) == "abcdefgh"
    assert lines(console) == [
        "  scoring: 2/8, 60 s left",
        "  scoring: 4/8, 40 s left",
        "  scoring: 6/8, 20 s left",
    ]


def test_a_short_step_prints_nothing(console: Console, clock: Clock) -> None:
    for _ in tracker(console)(range(100), "scoring"):
        clock.now += 0.1
    assert not lines(console)


def test_without_a_length_no_time_left(console: Console, clock: Clock) -> None:
    def items() -> Iterator[int]:
        yield from range(3)

    for _ in tracker(console)(items(), "reading"):
        clock.now += 20
    assert lines(console) == ["  reading: 1/?", "  reading: 2/?"]


def test_a_length_that_is_given(console: Console, clock: Clock) -> None:
    for _ in tracker(console)(iter("ab"), "reading", 2):
        clock.now += 20
    assert lines(console) == ["  reading: 1/2, 20 s left"]


@pytest.mark.parametrize("terminal", [True, False])
def test_labels_stand_for_themselves(terminal: bool, clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=80, color_system=None)
    for _ in tracker(console)("ab", "task [bold]x[/]"):
        clock.now += 20
    assert "task [bold]x[/]" in "\n".join(lines(console))


def test_bars_on_a_terminal_pass_everything_through(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    assert list(tracker(console)("abc", "scoring")) == ["a", "b", "c"]
    assert "scoring" in "\n".join(lines(console)) and "3/3" in "\n".join(lines(console))


def test_an_error_comes_through_both(clock: Clock) -> None:
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal)
        with pytest.raises(ZeroDivisionError):
            for item in tracker(console)([1, 0], "dividing"):
                _ = 1 // item
        assert list(tracker(console)("a", "again")) == ["a"], "the console is free again"


def test_silent() -> None:
    assert list(silent(iter("ab"), "nothing", 2)) == ["a", "b"]
