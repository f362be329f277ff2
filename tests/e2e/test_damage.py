"""Artifacts that changed since they were stored are named and never used; a store may be moved, and clocks may lie."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest

STAGES = ["sparsify", "quantize", "finetune", "search", "merge", "export", "evaluate"]


def flip(file: Path) -> None:
    """One bit, with the old time put back."""
    times, whole = file.stat(), bytearray(file.read_bytes())
    whole[len(whole) // 2] ^= 4
    file.write_bytes(whole)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))


def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def add(file: Path) -> None:
    shutil.copy(file, file.with_name(f"more-{file.name}"))


DAMAGE: list[Callable[[Path], None]] = [flip, truncate, Path.unlink, add]


@pytest.fixture(scope="module")
def finished(fork_server: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A place for a store that is made once, and not touched."""
    return {"store": tmp_path_factory.mktemp("finished") / "store"}


@pytest.fixture
def store(fork_server: Any, recipe: Path, finished: dict[str, Path], tmp_path: Path) -> Path:
    """A store in which the whole recipe is done."""
    if not finished["store"].exists():
        ended = fork_server.run("run", recipe, "--store", finished["store"])
        assert ended.status == 0, ended.said
    shutil.copytree(finished["store"], tmp_path / "store")
    return tmp_path / "store"


@pytest.mark.parametrize(
    "stage", [stage if stage == "finetune" else pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES]
)
def test_damage_is_named_and_made_again(
    fork_server: Any, content: Any, recipe: Path, finished: Any, store: Path, stage: str
) -> None:
    (folder,) = store.glob(f"artifacts/{stage}-*")
    names = sorted(json.loads((folder / "manifest.json").read_text())["files"])
    for damage in DAMAGE:
        name = Random(f"{stage}/{damage.__name__}").choice(names)
        kept = (folder / name).read_bytes()
        damage(folder / name)
        wrong = folder / name if damage is not add else (folder / name).with_name(f"more-{Path(name).name}")
        fork_server.run("run", recipe, "--store", store).assert_error(str(wrong), f"--fresh {stage}")
        (folder / name).write_bytes(kept)
        if damage is add:
            wrong.unlink()
        again = fork_server.run("run", recipe, "--store", store)
        assert again.status == 0 and "done in" not in again.said, again.said
    flip(folder / names[0])
    again = fork_server.run("run", recipe, "--store", store, "--fresh", stage)
    assert again.status == 0, again.said
    assert content(store) == content(finished["store"])


@pytest.mark.parametrize("schema", [0, 2, "1", None])
def test_an_artifact_of_another_schema(fork_server: Any, recipe: Path, store: Path, schema: Any) -> None:
    (folder,) = store.glob("artifacts/quantize-*")
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": schema}))
    fork_server.run("run", recipe, "--store", store).assert_error(
        str(folder), f"schema {schema}, this sqft reads 1", "--fresh"
    )
    plan = fork_server.run("plan", recipe, "--store", store)
    assert plan.status == 0 and plan.said.count("reuse") == 6, plan.said
    assert fork_server.run("run", recipe, "--store", store, "--fresh", "quantize").status == 0


@pytest.mark.parametrize("when", [0, 4_000_000_000], ids=["1970", "2096"])
def test_times_of_files_mean_nothing(fork_server: Any, recipe: Path, store: Path, when: int) -> None:
    for place in store.rglob("*"):
        os.utime(place, (when, when))
    again = fork_server.run("run", recipe, "--store", store)
    assert again.status == 0 and "done in" not in again.said, again.said
    (folder,) = store.glob("artifacts/merge-*")
    flip(folder / "model" / "model.safetensors")
    fork_server.run("run", recipe, "--store", store).assert_error("model.safetensors has changed", "--fresh merge")


@pytest.mark.parametrize("days", [-400, 400])
def test_a_clock_that_is_set_otherwise(
    raw: dict[str, Any], registry: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    """In both directions: what is remembered of files is either theirs or not used."""
    from sqft import Orchestrator, Recipe
    from sqft.errors import ArtifactError

    orchestrator = Orchestrator(registry, tmp_path)
    orchestrator.run(orchestrator.plan(Recipe.parse(raw)), until="sparsify")
    now = time.time_ns
    monkeypatch.setattr("sqft.utils.digests.time.time_ns", lambda: now() + days * 86_400 * 10**9)
    for _ in range(2):
        again = Orchestrator(registry, tmp_path)
        plan = again.plan(Recipe.parse(raw))
        assert plan.reused == {"sparsify"}
        run = again.run(plan, until="sparsify")
    time.sleep(0.02)  # more than a tick
    flip(run["sparsify"].folder / "model" / "model.safetensors")
    with pytest.raises(ArtifactError, match="has changed"):
        Orchestrator(registry, tmp_path).run(plan, until="sparsify")


def test_a_store_that_was_moved(fork_server: Any, recipe: Path, store: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere" / "named otherwise"
    moved.parent.mkdir()
    store.rename(moved)
    again = fork_server.run("run", recipe, "--store", moved)
    assert again.status == 0 and "done in" not in again.said, again.said
    (folder,) = (moved / "runs").iterdir()
    links = json.loads((folder / "run.json").read_text())["artifacts"]
    assert len(links) == 7 and all((folder / link / "manifest.json").is_file() for link in links.values()), links
    assert not any(Path(link).is_absolute() for link in links.values())


def test_an_adapter_of_a_store_that_was_moved(fork_server: Any, raw: dict[str, Any], tmp_path: Path) -> None:
    """The way to load it that is printed names the base where it lies now."""
    raw["finetune"]["merger"], raw["search"] = "unmerged", {}
    raw.pop("merge"), raw.pop("evaluate")
    recipe = tmp_path / "recipe.json"
    recipe.write_text(json.dumps(raw))
    assert fork_server.run("run", recipe, "--store", tmp_path / "store").status == 0
    (tmp_path / "store").rename(tmp_path / "moved")
    again = fork_server.run("run", recipe, "--store", tmp_path / "moved")
    assert again.status == 0 and "done in" not in again.said, again.said
    (base,) = (tmp_path / "moved").glob("artifacts/sparsify-*")
    assert f'from_pretrained("{base / "model"}"' in again.said.replace("\n", ""), again.said
