"""One run in several processes that `torchrun` or `accelerate launch` started.

The first process does what one process would do: it takes the locks, makes the steps, writes and speaks. The others
wait for its word, take part in the steps that all make together, and read what it stored. Words go through the
launcher's key-value store: a collective would give up after half an hour, and a step may take longer.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from sqft.errors import StageError

POLL = 0.05  # seconds between two looks for a word


GRACE = 5.0  # seconds for the process that failed first to say why


LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "remote process exited",
)
"""What torch's collectives say when a process at their other end is gone."""


@dataclass(eq=False)
class Processes:
    """This process among `count`; `store` is torch.distributed's, shared by them."""

    rank: int = 0
    count: int = 1
    store: Any = None
    said: int = 0
    groups: int = field(default=0, repr=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def broadcast(self, word: str) -> None:
        """Say the next word to the others; of the first process only."""
        if self.count > 1:
            self.store.set(f"word/{self.said}", word)
            self.said += 1

    def receive(self) -> str:
        """The first process's next word, waited for.

        Raises:
            StageError: when another process failed, which has said why.
        """
        key = f"word/{self.said}"
        while not self.store.check([key]):
            if self.store.check(["failures"]):
                raise StageError("another process failed")
            time.sleep(POLL)
        self.said += 1
        word: str = self.store.get(key).decode()
        return word

    def share(self, word: str) -> str:
        """The first process's word, in all of them."""
        if self.is_main:
            self.broadcast(word)
            return word
        return self.receive()

    def assert_same(self, word: str, what: str) -> None:
        """Raises:
        StageError: when this process's word is not the first's.
        """
        if self.share(word) != word:
            raise StageError(f"process {self.rank} {what}; give all of them the same recipe, data and packages")

    def should_report(self) -> bool:
        """Whether this process is to say why it failed: the first to fail does, and what follows from it is silent.

        The others stay a while, for a launcher that sees one process end ends them all, in the middle of a word.
        """
        if self.count == 1 or self.store.add("failures", 1) == 1:
            return True
        time.sleep(GRACE)
        return False

    def barrier(self) -> None:
        """Wait, inside `together`, until all processes are here."""
        if self.count > 1:
            from torch import distributed

            distributed.barrier()

    @contextmanager
    def process_group(self, device: str) -> Iterator[None]:
        """Inside, torch's collectives work; transformers' Trainer finds and uses them.

        Raises:
            StageError: when another process ended meanwhile.
        """
        if self.count == 1:
            yield
            return
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore

        store = PrefixStore(f"group/{self.groups}", self.store)
        self.groups += 1
        backend = "nccl" if device.startswith("cuda") else "gloo"
        distributed.init_process_group(backend, store=store, rank=self.rank, world_size=self.count)
        try:
            yield
        except RuntimeError as error:
            if not any(sign in str(error) for sign in LOST):
                raise
            raise StageError(
                "another process ended before its work was done (was it killed, or out of memory?); the same command "
                "goes on from the newest checkpoint"
            ) from error
        finally:
            distributed.destroy_process_group()


@cache
def processes() -> Processes:
    """This process among those that the launcher's environment tells of. All but the first are made silent."""
    rank, count = os.environ.get("RANK"), int(os.environ.get("WORLD_SIZE", 1))
    if rank is None or count == 1:
        return Processes()
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(rendezvous("env://"))
    if rank != "0":
        logging.disable(logging.WARNING)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for as long as the process lives
    return Processes(int(rank), count, PrefixStore("sqft", store))
