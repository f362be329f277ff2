"""How much memory this process may have: the machine's, or its container's or job's."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from sqft.utils.resources import free_memory

GIB = 1 << 30


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 40 GiB available; this process has 1 GiB."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=40 * GIB))
    has = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=GIB))
    monkeypatch.setattr(psutil, "Process", lambda: has)


def written(folder: Path, files: Mapping[str, object]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(f"{content}\n")
    return folder


def test_what_the_machine_has_available(tmp_path: Path) -> None:
    assert free_memory(1, tmp_path / "none", tmp_path) == 41 * GIB
    assert free_memory(3, tmp_path / "none", tmp_path) == 43 * GIB
    own = written(tmp_path, {"own": "0::/"}) / "own"
    assert free_memory(1, own, tmp_path / "groups") == 41 * GIB
    assert free_memory(1, own, written(tmp_path / "groups", {"memory.max": "max", "memory.current": 5})) == 41 * GIB


@pytest.mark.parametrize("job", ["", "slurm/job_7"])
def test_a_container_or_a_job_may_have_less(job: str, tmp_path: Path) -> None:
    """Of version 2. Copies of files make room; the group around a job has a limit as well."""
    own = written(tmp_path, {"own": f"0::/{job}"}) / "own"
    stat = f"anon 12\ninactive_file {2 * GIB}"
    written(tmp_path / job, {"memory.max": 10 * GIB, "memory.current": 4 * GIB, "memory.stat": stat})
    assert free_memory(1, own, tmp_path) == 9 * GIB
    if job:
        written(tmp_path / "slurm", {"memory.max": 8 * GIB, "memory.current": 8 * GIB})
        assert free_memory(1, own, tmp_path) == GIB


@pytest.mark.parametrize("total", ["", "total_"])
def test_files_in_use_make_room_too(total: str, tmp_path: Path) -> None:
    """Of version 1 the totals count, with those of the groups inside."""
    own = written(tmp_path, {"own": "0::/"}) / "own"
    stat = f"inactive_file 1\n{total}inactive_file {GIB}\n{total}active_file {3 * GIB}\n{total}slab_reclaimable {GIB}"
    stat = stat if total else stat.partition("\n")[2]
    written(tmp_path, {"memory.max": 10 * GIB, "memory.current": 9 * GIB, "memory.stat": stat})
    assert free_memory(1, own, tmp_path) == 7 * GIB


def test_what_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "own").write_bytes(b"\n\nnothing\n0::\n3:memory\n0::/caf\xe9\n")
    written(tmp_path, {"memory.max": 4 * GIB, "memory.current": GIB, "memory.stat": "odd"})
    assert free_memory(1, tmp_path / "own", tmp_path) == 4 * GIB


def test_version_1(tmp_path: Path) -> None:
    own = written(tmp_path, {"own": "7:cpu,cpuacct:/a\n4:memory:/a"}) / "own"
    written(tmp_path / "memory" / "a", {"memory.limit_in_bytes": 6 * GIB, "memory.usage_in_bytes": GIB})
    assert free_memory(1, own, tmp_path) == 6 * GIB


def test_here() -> None:
    assert os.name != "posix" or 0 < free_memory() <= 41 * GIB


PACKED = """
import re, sys, torch
from pathlib import Path
from sqft.modeling.adapters.frozen_weight import SparseWeight
from sqft.utils.resources import return_freed_memory

def taken():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(1)
kept, before = [], taken()
for _ in range(16):
    weight = torch.randn(2048, 1024, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    kept.append(SparseWeight(weight, True))
    del weight
    if sys.argv[1] == "return":
        return_freed_memory()
print((taken() - before) / sum(buffer.nbytes for one in kept for buffer in one.buffers()))
"""


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="not with glibc")
def test_what_was_freed_between_packed_layers_is_returned() -> None:
    """In processes of their own, whose memory nothing else has used: bytes taken for each byte that is packed."""
    found = [
        float(subprocess.run([sys.executable, "-c", PACKED, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "return")
    ]
    assert 0.9 < found[1] < 1.3 and found[1] < found[0]
