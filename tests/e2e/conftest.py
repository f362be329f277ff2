"""Whole runs of the command at a fraction of their cost: forks of one process that has done its imports."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest


@dataclass
class Ended:
    """How a run ended; `seconds` and `changes` to the file system count from the start of the stage asked about."""

    status: int
    said: str
    seconds: float | None
    changes: int

    def assert_error(self, *words: str) -> None:
        """It ended with one message that holds these words, and no traceback."""
        assert self.status == 2, f"{self.status}: {self.said}"
        assert len(re.findall("(?m)^error: ", self.said)) == 1 and "Traceback" not in self.said, self.said
        message = self.said.partition("error: ")[2]
        assert all(word in message for word in words), message


class ForkServer:
    """`sqft run` as often as wanted; see fork_server.py."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self.process, self.folder = process, folder

    def run(self, *argv: object, **how: Any) -> Ended:
        (ended,) = self.together([*argv], **how)
        return ended

    def together(self, *commands: list[object], first: dict[str, Any] | None = None, **how: Any) -> list[Ended]:
        """Commands started at once; `first` is how the first of them runs."""
        assert self.process.stdin and self.process.stdout
        files = [self.folder / f"said-{number}" for number in range(len(commands))]
        runs: list[dict[str, Any]] = [{"argv": [*map(str, argv)], **how} for argv in commands]
        runs[0] |= first or {}
        for run, file in zip(runs, files, strict=True):
            run["said"] = str(file)
        self.process.stdin.write(json.dumps({"runs": runs}) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, "the fork_server died"
        return [
            Ended(said=file.read_text("utf-8", "replace"), **ended)
            for file, ended in zip(files, json.loads(answer), strict=True)
        ]


OF_THE_CLOCK = {"step_seconds", "resumed_from"}
"""What a report may say otherwise after a kill."""


def content_of(store: Path) -> dict[str, Any]:
    """What every finished artifact holds and reports, without times and without the store's own place."""
    found: dict[str, Any] = {}
    for folder in sorted((store / "artifacts").glob("[!.]*")):
        manifest = json.loads((folder / "manifest.json").read_text())
        for name in manifest["files"]:
            whole = (folder / name).read_bytes()
            if name == "adapter/sqft_adapter.json":
                whole = re.sub(rb'"/.*/artifacts/', b'"', whole)  # the base's place
            found[f"{folder.name}/{name}"] = hashlib.sha256(whole).hexdigest()
        found[folder.name] = {key: value for key, value in manifest["report"].items() if key not in OF_THE_CLOCK}
    return found


@pytest.fixture(scope="session")
def content() -> Callable[[Path], dict[str, Any]]:
    return content_of


@pytest.fixture
def recipe(raw: dict[str, Any], tmp_path: Path) -> Path:
    """All seven stages."""
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["export"] = [{"exporter": "compressed-tensors"}]
    raw["evaluate"]["of"] = ["merge"]
    place = tmp_path / "recipe.json"
    place.write_text(json.dumps(raw))
    return place


@pytest.fixture(scope="session")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield ForkServer(process, tmp_path_factory.mktemp("fork_server"))
        assert process.stdin
        process.stdin.close()
