"""One run in several processes that `torchrun` or `accelerate launch` started.

The first process does what a single process would do: it takes the locks, makes the steps, writes and reports. The
others wait for its messages, take part in the steps that all make together, and read what it stored. Messages go
through the launcher's key-value store, which has no time limit: a step may take long. In the steps that all make
together, tensors go through torch's collectives.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from typing import Any

from sqft.errors import DeviceError

POLL_SECONDS = 0.05
"""Time between two looks for a message."""
GRACE_SECONDS = 5.0
"""How long the other processes wait before they end, so that the one that failed first can print its message."""
NO_LIMIT = timedelta(days=365)
"""How long gloo's collectives wait: others may compute for hours. A process that is gone ends the connection."""
BY_TORCHRUN = "start several processes by torchrun, or unset both for one"
LOST_CONNECTION = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
)
"""Messages of torch's collectives when a process at their other end is gone."""


@dataclass(eq=False)
class Processes:
    """This process among `count`; `store` is torch.distributed's key-value store, which they share."""

    rank: int = 0
    count: int = 1
    store: Any = None
    messages: int = 0
    """How many messages this process has sent, or received."""
    groups: int = field(default=0, repr=False)
    failed_first: bool | None = field(default=None, repr=False)
    """Whether this process was the first one to fail; None while it has not failed."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def here(self) -> int:
        """Return how many of them are on this machine, as the launcher says."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.count)) if self.count > 1 else 1

    def broadcast(self, message: str) -> None:
        """Send the next message to all other processes; only the first process may."""
        if self.count > 1:
            self.store.set(f"message/{self.messages}", message)
            self.messages += 1

    def receive(self) -> str:
        """Wait for the first process's next message and return it.

        Raises:
            DeviceError: when another process failed, which has printed why.
        """
        message = self._wait_for(f"message/{self.messages}")
        self.messages += 1
        return message

    def share(self, message: str) -> str:
        """Return the first process's message in all processes."""
        if self.is_main:
            self.broadcast(message)
            return message
        return self.receive()

    def gather(self, value: str) -> list[str]:
        """Return the values of all processes in the first one, in order; nothing in the others. Once after a message.

        Raises:
            DeviceError: when another process failed, which has printed why.
        """
        key = f"gathered/{self.messages}"
        if self.is_main:
            return [value, *(self._wait_for(f"{key}/{rank}") for rank in range(1, self.count))]
        self.store.set(f"{key}/{self.rank}", value)
        return []

    def _wait_for(self, key: str) -> str:
        while not self.store.check([key]):
            if self.store.check(["failures"]):
                raise DeviceError("another process failed")
            time.sleep(POLL_SECONDS)
        value: str = self.store.get(key).decode()
        return value

    def assert_same(self, value: str, difference: str) -> None:
        """Check that all processes have the same value; `difference` completes "process 1 …".

        Raises:
            DeviceError: when this process's value is not the first's.
        """
        if self.share(value) != value:
            raise DeviceError(f"process {self.rank} {difference}; give all of them the same recipe, data and packages")

    def should_report(self) -> bool:
        """Decide whether this process prints why it failed: only the first one to fail does.

        The others wait a while first, since a launcher that sees one process end stops all of them, and the message
        would be cut off.
        """
        if self.count == 1:
            return True
        self.claim_failure()
        if not self.failed_first:
            time.sleep(GRACE_SECONDS)
        return bool(self.failed_first)

    def claim_failure(self) -> None:
        """Be the process that reports why the run failed, unless another one was faster."""
        if self.failed_first is None:
            self.failed_first = self.store.add("failures", 1) == 1

    def barrier(self) -> None:
        """Wait until all processes are here; only inside `process_group`."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    @contextmanager
    def process_group(self, device: str) -> Iterator[None]:
        """Make torch's collectives work inside the block; transformers' Trainer finds and uses them.

        Raises:
            DeviceError: when another process ended meanwhile.
        """
        if self.count == 1:
            yield
            return
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        store = PrefixStore(f"group/{self.groups}", self.store)
        self.groups += 1
        backend, limit = ("nccl", None) if device.startswith("cuda") else ("gloo", NO_LIMIT)
        distributed.init_process_group(backend, timeout=limit, store=store, rank=self.rank, world_size=self.count)
        try:
            yield
        except BaseException as error:
            if not (isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_CONNECTION)):
                self.claim_failure()  # before the others see that this process is gone
                raise
            raise DeviceError(
                "another process ended before its work was done (was it killed, or out of memory?); the same command "
                "continues from what is finished"
            ) from error
        finally:
            distributed.destroy_process_group()


@cache
def processes() -> Processes:
    """Return this process among those of the launcher, whose environment variables say how many there are.

    Raises:
        DeviceError: when they do not say where the processes meet, or not all come there.
    """
    rank, count = _launched()
    if count == 1:
        return Processes()
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    try:
        store, _, _ = next(rendezvous("env://"))
    except (RuntimeError, ValueError) as error:  # torch's errors of stores and networks are RuntimeErrors
        reason = str(error).splitlines()[0]
        given = f"RANK is {rank} and WORLD_SIZE {count}"
        raise DeviceError(f"{given}, but the processes do not meet: {reason}; {BY_TORCHRUN}") from error
    return Processes(rank, count, PrefixStore("sqft", store))


def met_processes() -> Processes:
    """Return this process among those that it has met: alone as long as it met none, whatever the launcher says."""
    return processes() if processes.cache_info().currsize else Processes()


def is_one_of_several() -> bool:
    """Return whether a launcher started several processes; none of them is asked."""
    return _launched()[1] > 1


def mute_unless_main() -> None:
    """Silence this process for the rest of its life if it is not the first one of a launcher: logs and stdout."""
    rank, _ = _launched()
    if rank > 0:
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives


def _launched() -> tuple[int, int]:
    """Return rank and number of the processes that a launcher started; 0 and 1 without a launcher.

    Raises:
        DeviceError: when its environment variables do not make sense.
    """
    given = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    if not all(given):
        return 0, 1
    rank, count = (int(word) if word.isdecimal() else -1 for word in given)
    if not 0 <= rank < count:
        said = "RANK is {!r} and WORLD_SIZE {!r}".format(*given)
        raise DeviceError(f"{said}, expected 0 ≤ RANK < WORLD_SIZE; {BY_TORCHRUN}")
    return rank, count
