"""What a result cost and what it was made with."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import sqft


def versions() -> dict[str, str]:
    """Return the versions of the packages that a result was made with."""
    return {"sqft": sqft.__version__} | {name: metadata.version(name) for name in ("torch", "transformers", "peft")}


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Measure this process's peak resident memory in bytes, of the block alone where the system can tell.

    The list that is yielded holds it once the block has ended.
    """
    peak = [0]
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass
    yield peak
    try:
        status = Path("/proc/self/status").read_text()
        peak[0] = int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        peak[0] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
