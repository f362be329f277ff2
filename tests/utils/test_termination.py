"""SIGTERM inside and outside `terminable`, in this process and in others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from threading import Thread
from typing import Any

import pytest

from sqft.utils.termination import Terminated, terminable


@pytest.fixture(autouse=True)
def stays_default() -> Iterator[None]:
    hook = sys.unraisablehook
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL and sys.unraisablehook is hook


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_it_ends_work_as_ctrl_c_does_once() -> None:
    cleaned = []
    with pytest.raises(KeyboardInterrupt) as raised, terminable(), terminable():
        try:
            terminate()
        finally:
            terminate()  # what is impatient sends two
            cleaned.append(True)
    assert raised.type is Terminated and cleaned


class Interrupted:
    def __init__(self, sent: signal.Signals) -> None:
        self.sent = sent

    def __del__(self) -> None:
        os.kill(os.getpid(), self.sent)  # python prints what a finalizer raises, and goes on


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_one_that_python_drops_is_sent_again(sent: signal.Signals, capfd: pytest.CaptureFixture[str]) -> None:
    gone_on, start = False, time.monotonic()
    with pytest.raises(KeyboardInterrupt) as raised, terminable(), terminable():
        interrupted = Interrupted(sent)
        del interrupted
        gone_on = True
        time.sleep(20)
    assert gone_on and raised.type is (Terminated if sent == signal.SIGTERM else KeyboardInterrupt)
    assert time.monotonic() - start < 4 and not capfd.readouterr().err


def test_other_exceptions_that_python_drops_are_shown_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def __del__(self) -> None:
            raise ValueError("of a finalizer")

    shown: list[Any] = []
    monkeypatch.setattr("sys.unraisablehook", lambda what: shown.append(what.exc_value))
    with terminable():
        fails = Fails()
        del fails
    assert "of a finalizer" in str(shown)


def test_what_is_started_inside_can_be_ended_too() -> None:
    """A process that starts while this one is ending has SIGTERM as ever: no handler but Python's is inherited."""
    with pytest.raises(Terminated), terminable():
        try:
            terminate()
        finally:
            code = "import os, time; os.kill(os.getpid(), 15); time.sleep(20)"
            child = subprocess.run([sys.executable, "-c", code], check=False)
    assert child.returncode == -signal.SIGTERM


def test_a_program_keeps_its_own_handler() -> None:
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append(True))
    try:
        with terminable():
            terminate()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert seen


def test_other_threads_and_several_processes_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = []

    def inside() -> None:
        with terminable():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = Thread(target=inside)
    thread.start()
    thread.join()
    monkeypatch.setattr("sqft.utils.termination.is_one_of_several", lambda: True)
    inside()
    assert handlers == [signal.SIG_DFL] * 2


def test_outside_it_kills_as_ever() -> None:
    code = "import os; from sqft.utils.termination import terminable\nwith terminable(): pass\nos.kill(os.getpid(), 15)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGTERM
