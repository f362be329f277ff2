"""SIGKILL at random moments of every stage: the next run ends bit for bit as one that nobody disturbed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from random import Random
from typing import Any

import pytest

STAGES = ["sparsify", "quantize", "finetune", "search", "merge", "export", "evaluate"]
KILLS = int(os.environ.get("SQFT_KILLS", "3"))
SEED = int(os.environ.get("SQFT_KILL_SEED", "0"))


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stores")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("stage", "streamed"),
    [*((stage, False) for stage in STAGES), ("sparsify", True), ("quantize", True), ("merge", True)],
)
def test_killed_anywhere(
    fork_server: Any, content: Any, recipe: Path, stores: Path, stage: str, streamed: bool
) -> None:
    stores = stores / ("streamed" if streamed else "in memory")
    if streamed and stage == "merge":  # into a base of floats
        stores = stores / "floats"
        raw = json.loads(recipe.read_text())
        del raw["quantize"]
        raw["finetune"]["merger"], raw["export"] = "sparsepeft", [{"exporter": "hf"}]
        recipe.write_text(json.dumps(raw))
    stores.mkdir(parents=True, exist_ok=True)
    whole, before = stores / "whole", stores / f"before-{stage}"
    if not whole.exists():
        ended = fork_server.run("run", recipe, "--store", whole, streamed=streamed)
        assert ended.status == 0, ended.said
    if (number := STAGES.index(stage)) > 0:
        until = ["--until", STAGES[number - 1]]
        ended = fork_server.run("run", recipe, "--store", before, *until, streamed=streamed)
        assert ended.status == 0, ended.said
    else:
        before.mkdir()
    words = ["run", recipe, "--until", stage, "--store"]
    lengths = stores / f"length-{stage}"
    shutil.copytree(before, lengths)
    undisturbed = fork_server.run(*words, lengths, stage=stage, streamed=streamed)
    assert undisturbed.status == 0, undisturbed.said
    assert undisturbed.seconds and undisturbed.changes
    wanted = content(lengths)
    assert wanted == {name: made for name, made in content(whole).items() if name in wanted}
    died = 0
    for trial in range(KILLS):
        seed = f"{SEED}/{stage}/{trial}"
        rng, store = Random(seed), stores / f"{stage}-{trial}"
        shutil.copytree(before, store)
        kills = []
        for _ in range(rng.choice([1, 1, 2, 3])):
            how: dict[str, Any] = {"after": rng.uniform(0, 1.1 * undisturbed.seconds)}
            if rng.random() < 0.5:
                how = {"at": rng.randint(1, undisturbed.changes)}
            killed = fork_server.run(*words, store, stage=stage, streamed=streamed, **how)
            kills.append((how, killed.status))
            assert killed.status in (0, -signal.SIGKILL), f"{seed} {kills}: {killed.said}"
            if killed.status == 0:
                break
            died += 1
        ended = fork_server.run(*words, store, streamed=streamed)
        print(f"SQFT_KILL_SEED={SEED} {stage} trial {trial}: {kills}")
        assert ended.status == 0, f"{seed} {kills}: {ended.said}"
        found = content(store)
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        assert not odd, f"{seed} {kills}: {odd} are not as an uninterrupted run's"
        left = [p.name for p in (store / "artifacts").iterdir() if p.name.startswith(".") and p.name != ".locks"]
        left += [str(p.relative_to(store)) for p in store.glob("artifacts/*/checkpoints")]
        assert not left, f"{seed} {kills}: {left} were left behind"
        shutil.rmtree(store)
    assert died, "no kill came in time"
