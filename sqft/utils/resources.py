"""What a result cost and what it was made with."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil

import sqft

CGROUPS = Path("/sys/fs/cgroup")
"""Where Linux says what a container, or a job on a cluster, may use."""
RECLAIMED = ("inactive_file", "active_file", "slab_reclaimable")
"""What a control group has in memory and gives back when memory is wanted: most of all, copies of files."""


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


def free_memory(processes: int = 1, own: Path = Path("/proc/self/cgroup"), groups: Path = CGROUPS) -> int:
    """Return the bytes of memory that this process may have, those that it has included: what is available on the
    machine, or in its container or job where that is less.

    Args:
        processes: how many processes of this one's size share it; what each of them has is included.
        own: the file that names this process's control groups.
        groups: the folder of all groups.
    """
    available: int = psutil.virtual_memory().available
    for folder in _groups_of(own, groups):
        most = _number(folder, "memory.max", "memory.limit_in_bytes")
        used = _number(folder, "memory.current", "memory.usage_in_bytes")
        if most is not None and used is not None:
            available = min(available, most - used + _cached(folder))
    own_bytes: int = psutil.Process().memory_info().rss
    return max(0, available) + processes * own_bytes


def return_freed_memory() -> None:
    """Return to the system what this process has freed; call it between layers that are packed as they are loaded.

    glibc keeps freed pages for later, and those between tensors that stay are too small for the next layer: without
    this, a packed model takes up to four times its size. Other C libraries do not have the call, and nothing happens.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)


def free_what_is_unused() -> None:
    """Collect objects that refer to one another, such as a model and what trained it, and return their memory."""
    gc.collect()
    return_freed_memory()


def _groups_of(own: Path, groups: Path) -> Iterator[Path]:
    """Yield the folders of this process's control groups for memory, and those around them, of version 2 and 1."""
    try:
        lines = own.read_text("utf-8", "surrogateescape").splitlines()
    except OSError:  # not on Linux
        return
    for line in lines:
        _, _, rest = line.partition(":")
        kinds, _, path = rest.partition(":")
        if not path or (kinds and "memory" not in kinds.split(",")):
            continue
        root = groups / "memory" if kinds else groups
        folder = root / path.lstrip("/")
        yield from (inner for inner in (folder, *folder.parents) if inner == root or root in inner.parents)


def _number(folder: Path, *names: str) -> int | None:
    """Return the number in the first file of these names that is there; None where none is, or it says "max"."""
    for name in names:
        try:
            return int((folder / name).read_text())
        except (OSError, ValueError):
            pass
    return None


def _cached(folder: Path) -> int:
    """Return the bytes of a group that are copies of files, which make room when memory is wanted."""
    try:
        lines = map(str.split, (folder / "memory.stat").read_text().splitlines())
        stat = {line[0]: line[1] for line in lines if len(line) == 2}
        # In version 1 only the totals count the groups inside.
        return sum(int(stat.get(f"total_{name}", stat.get(name, 0))) for name in RECLAIMED)
    except (OSError, ValueError):
        return 0
