"""Runs of `sqft` in forks of one process that has done its imports, which may be killed at a chosen moment.

Reads a JSON object a line: {"runs": [{"argv", "said", "code"?, "stage"?, "after"?, "at"?, "blind"?, "later"?,
"streamed"?}, …]}, all started at once, or some seconds `later`. A run with `code` is that of Python, and not of `sqft`.
A `streamed` one goes through models of any size one block at a time.
A run is killed `after` seconds from the start of `stage`, or `at` its so-many-th change to the file system from there
on; a `blind` one does not see beforehand that the disk has too little room. Writes a JSON list a line: each run's
{"status", "seconds", "changes"}, from the start of `stage`.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

torch.set_num_threads(1)  # before the first fork: a child has none of its parent's threads
import peft  # noqa: E402, F401
import transformers.trainer  # noqa: E402, F401

import sqft.stages.evaluate  # noqa: E402
import sqft.stages.export  # noqa: E402
import sqft.stages.finetune  # noqa: E402
import sqft.stages.merge  # noqa: E402
import sqft.stages.preflight  # noqa: E402
import sqft.stages.quantize  # noqa: E402
import sqft.stages.search  # noqa: E402
import sqft.stages.sparsify  # noqa: E402, F401
from sqft.cli import main  # noqa: E402
from sqft.components.registry import Registry  # noqa: E402
from sqft.execution import preflight  # noqa: E402
from sqft.planning import streaming  # noqa: E402

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "fcntl.flock"}


def live(run: dict[str, Any], pipe: int) -> None:
    """The child: tell when the stage begins and, if it lives so long, how many changes it made."""
    counting, changes = False, 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if counting and (writes or event in CHANGES):
            changes += 1
            if changes == run.get("at"):
                os.kill(os.getpid(), signal.SIGKILL)

    def notify(self: Registry, hook: str, **arguments: Any) -> Iterator[tuple[str, BaseException]]:
        nonlocal counting
        if hook == "sqft_stage_started" and arguments["step"].stage == run.get("stage") and not counting:
            os.write(pipe, b"s")
            counting = True
        return notified(self, hook, **arguments)

    notified, Registry.notify = Registry.notify, notify  # type: ignore[method-assign]
    if run.get("streamed"):
        streaming.STREAM_FROM = 0
    if run.get("blind"):
        preflight.check_disk = lambda *_: None  # type: ignore[assignment]
    time.sleep(run.get("later", 0))
    sys.addaudithook(count)
    sys.argv = ["sqft", *run["argv"]]
    said = os.open(run["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    status = 1
    try:
        exec(run["code"], {"__name__": "__main__"}) if "code" in run else main(run["argv"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        import traceback

        traceback.print_exc()
    counting = False
    sys.stdout.flush()
    sys.stderr.flush()
    os.write(pipe, struct.pack("<q", changes))
    os._exit(status)


def start(run: dict[str, Any]) -> tuple[int, int]:
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    os.close(reading)
    live(run, writing)
    raise AssertionError


def watch(run: dict[str, Any], child: int, pipe: int) -> dict[str, Any]:
    began, changes = None, 0
    if os.read(pipe, 1) == b"s":
        began = time.monotonic()
        if (after := run.get("after")) is not None and not select.select([pipe], [], [], after)[0]:
            os.kill(child, signal.SIGKILL)
        if len(rest := os.read(pipe, 8)) == 8:
            (changes,) = struct.unpack("<q", rest)
    _, status = os.waitpid(child, 0)
    os.close(pipe)
    seconds = time.monotonic() - began if began is not None else None
    return {"status": os.waitstatus_to_exitcode(status), "seconds": seconds, "changes": changes}


gc.freeze()  # a child's collector leaves alone, and so does not copy, what all of them share
for line in sys.stdin:
    started = [(run, *start(run)) for run in json.loads(line)["runs"]]
    print(json.dumps([watch(*each) for each in started]), flush=True)
