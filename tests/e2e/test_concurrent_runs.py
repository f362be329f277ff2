"""Two runs at once in one store: both succeed, and what they share is made once."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest


def made(stage: str, *runs: Any) -> int:
    return sum(f"] {stage}: done in" in ended.said for ended in runs)


def test_the_same_recipe_twice(fork_server: Any, content: Any, recipe: Path, tmp_path: Path) -> None:
    command = ["run", recipe, "--store", tmp_path / "store"]
    both = fork_server.together(command, command)
    assert [ended.status for ended in both] == [0, 0], "\n".join(ended.said for ended in both)
    for stage in ("sparsify", "quantize", "finetune", "search", "merge", "export", "evaluate:merge"):
        assert made(stage, *both) == 1, stage
    alone = fork_server.run("run", recipe, "--store", tmp_path / "alone")
    assert alone.status == 0 and content(tmp_path / "store") == content(tmp_path / "alone")
    (folder,) = (tmp_path / "store" / "runs").iterdir()
    assert json.loads((folder / "report.json").read_text())["rows"]


def test_recipes_that_share_the_sparse_base(fork_server: Any, raw: dict[str, Any], tmp_path: Path) -> None:
    for section in ("search", "merge", "evaluate"):
        raw.pop(section)
    recipes = []
    for number, adapter in enumerate([{"name": "lora", "options": {"rank": 4}}, raw["finetune"]["adapter"]]):
        raw["finetune"]["adapter"] = adapter
        recipes.append(tmp_path / f"{number}.json")
        recipes[-1].write_text(json.dumps(raw))
    store = tmp_path / "store"
    both = fork_server.together(*(["run", recipe, "--store", store] for recipe in recipes))
    assert [ended.status for ended in both] == [0, 0], "\n".join(ended.said for ended in both)
    assert made("sparsify", *both) == 1 and made("finetune", *both) == 2
    assert len(list(store.glob("artifacts/sparsify-*"))) == 1


def test_the_one_that_waits_goes_on_where_the_other_was_killed(fork_server: Any, recipe: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert fork_server.run("run", recipe, "--store", store, "--until", "quantize").status == 0
    command = ["run", recipe, "--store", store, "--until", "finetune"]
    alone = fork_server.run(*command[:-3], tmp_path / "alone", *command[-2:], stage="finetune")
    killed, other = fork_server.together(command, command, stage="finetune", first={"at": alone.changes // 2})
    assert other.status == 0, other.said
    assert made("finetune", killed, other) == 1
    if killed.status != 0:  # else the other came first
        assert killed.status == -signal.SIGKILL and "resuming fine-tuning" in other.said


@pytest.mark.parametrize(
    ("seed", "stage"),
    [
        (0, "finetune"),
        *(pytest.param(n, s, marks=pytest.mark.slow) for n in range(1, 6) for s in ("sparsify", "finetune")),
    ],
)
def test_one_begins_afresh_while_the_other_works(
    fork_server: Any, recipe: Path, tmp_path: Path, seed: int, stage: str
) -> None:
    """What a run builds on does not vanish under it: the one that would forget it waits."""
    store = tmp_path / "store"
    assert fork_server.run("run", recipe, "--store", store).status == 0
    command = ["run", recipe, "--store", store]
    later = Random(f"{seed}/{stage}").uniform(0.2, 2.5)
    fresh, other = fork_server.together(
        [*command, "--fresh", stage], [*command, "--fresh", "finetune"], first={"later": later}
    )
    assert [fresh.status, other.status] == [0, 0], f"{later}: {fresh.said}\n{other.said}"
