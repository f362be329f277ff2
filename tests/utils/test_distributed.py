"""Several processes: who reports, who waits, and what they share. `torchrun` itself: tests/e2e/test_processes.py."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator

import pytest
from torch.distributed import HashStore

import sqft.utils.distributed
from sqft.errors import DeviceError
from sqft.utils.distributed import Processes, met_processes, mute_unless_main, processes


def two() -> tuple[Processes, Processes]:
    store = HashStore()
    return Processes(0, 2, store), Processes(1, 2, store)


def test_one_process_needs_no_one() -> None:
    alone = Processes()
    alone.broadcast("stands")
    alone.assert_same("a plan", "plans another run")
    alone.barrier()
    with alone.process_group("cpu"):
        assert alone.share("word") == "word" and alone.should_report()


def test_messages_come_in_order_and_are_waited_for() -> None:
    first, second = two()
    heard: list[str] = []
    listener = threading.Thread(target=lambda: heard.extend(second.receive() for _ in range(2)))
    listener.start()
    first.broadcast("together")
    assert first.share("stands") == "stands"
    listener.join(10)
    assert heard == ["together", "stands"]


def test_values_of_all_come_together_in_the_first() -> None:
    """A round that the first process did not finish does not count in the next one."""
    first, second = two()
    for word, other in (("a", "b"), ("c", "d")):
        first.broadcast("next")
        assert second.receive() == "next" and second.gather(other) == []
        if word == "c":
            assert first.gather(word) == ["c", "d"]
    first.broadcast("more")
    assert Processes().gather("alone") == ["alone"]
    second.should_report()
    with pytest.raises(DeviceError, match="another process failed"):
        first.gather("e")


def test_another_plan_is_refused() -> None:
    first, second = two()
    first.assert_same("a", "plans another run")
    with pytest.raises(DeviceError, match="process 1 plans another run"):
        second.assert_same("b", "plans another run")


def test_the_first_to_fail_reports_and_the_others_do_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqft.utils.distributed, "GRACE_SECONDS", 0.0)
    first, second = two()
    assert second.should_report() and not first.should_report()
    with pytest.raises(DeviceError, match="another process failed"):
        second.receive()


@pytest.mark.parametrize(("rank", "count", "muted"), [("0", "2", False), ("1", "2", True), (None, "2", False)])
def test_all_but_the_first_process_can_be_muted(
    monkeypatch: pytest.MonkeyPatch, rank: str | None, count: str, muted: bool
) -> None:
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    try:
        mute_unless_main()
        assert (getattr(sys.stdout, "name", None) == os.devnull) == muted
        assert logging.getLogger("sqft").isEnabledFor(logging.WARNING) != muted
        assert logging.getLogger("sqft").isEnabledFor(logging.ERROR)
    finally:
        logging.disable(logging.NOTSET)


def test_to_ask_for_the_processes_mutes_nothing() -> None:
    before = sys.stdout
    assert processes() is processes() and processes().is_main and sys.stdout is before


@pytest.fixture
def unmet() -> Iterator[None]:
    """Processes that have not met yet, as at the start of a command."""
    processes.cache_clear()
    yield
    processes.cache_clear()


@pytest.mark.parametrize(
    ("rank", "count", "message"),
    [
        ("0", "two", "RANK is '0' and WORLD_SIZE 'two', expected 0 ≤ RANK < WORLD_SIZE"),
        ("2", "2", "RANK is '2' and WORLD_SIZE '2', expected"),
        ("0", "2", "RANK is 0 and WORLD_SIZE 2, but the processes do not meet: .*MASTER_ADDR expected"),
    ],
)
def test_a_launcher_that_does_not_say_where_to_meet(
    unmet: None, monkeypatch: pytest.MonkeyPatch, rank: str, count: str, message: str
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert met_processes().count == 1
    with pytest.raises(DeviceError, match=f"{message}.*; start several processes by torchrun, or unset both for one"):
        processes()


@pytest.mark.parametrize("given", [{}, {"RANK": "0"}, {"WORLD_SIZE": "4"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_one_process_whatever_is_said(unmet: None, monkeypatch: pytest.MonkeyPatch, given: dict[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, word in given.items():
        monkeypatch.setenv(name, word)
    assert (processes().rank, processes().count) == (0, 1)
