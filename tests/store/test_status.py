"""What a store holds, and what may go: two recipes on one sparse base, work left undone, damage, other processes."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.cli import main
from sqft.errors import SqftError
from sqft.store.artifacts import Store
from sqft.store.status import ArtifactStatus, age, prune, scan_store

PRINT = "0123456789ab" + "c" * 52


def put(store: Store, stage: str = "merge", fingerprint: str = PRINT, users: tuple[str, ...] = ()) -> Path:
    """An artifact made without any stage, and runs that refer to it."""
    with store.begin(stage, fingerprint) as scratch:
        (scratch / "weights.bin").write_bytes(b"x" * 1000)
        folder = store.commit(scratch, {"stage": stage, "fingerprint": fingerprint, "report": {}}).folder
    for user in users:
        (store.runs / user).mkdir(parents=True, exist_ok=True)
        (store.runs / user / "plan.json").write_text(json.dumps([{"name": stage, "fingerprint": fingerprint}]))
    return folder


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def only(store: Store) -> ArtifactStatus:
    (held,) = scan_store(store).artifacts
    return held


def test_two_recipes_share_a_sparse_base(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    raw["evaluate"]["of"] = ["merge"]
    other = copy.deepcopy(raw)
    other["name"], other["finetune"]["steps"] = "other", 4

    def run(recipe: dict[str, Any]) -> Run:
        orchestrator = Orchestrator(registry, tmp_path)
        return orchestrator.run(orchestrator.plan(Recipe.parse(recipe)))

    one, two, store = run(raw), run(other), Store(tmp_path)
    shared = one["sparsify"].folder
    assert two["sparsify"].folder == shared
    holdings = scan_store(store)
    users = {held.folder: set(held.runs) for held in holdings.artifacts}
    assert users[shared] == {one.folder.name, two.folder.name}
    assert users[one["merge"].folder] == {one.folder.name}
    assert not holdings.prunable and all(holdings.completed_steps(holdings.runs[0]).values())
    assert holdings.size == sum(f.stat().st_size for f in store.artifacts.rglob("*") if f.is_file())

    shutil.rmtree(one.folder)
    done = CliRunner().invoke(main, ["status", "--store", str(tmp_path), "--prune", "--yes"])
    assert done.exit_code == 0, done.output
    assert {held.folder for held in scan_store(store).artifacts} == {outcome.folder for outcome in two.values()}
    (left,) = scan_store(store).results.values()  # as a real report has it
    assert left.sparsity == two.report["rows"][-1]["sparsity"] and left.accuracy == two.report["rows"][-1]["accuracy"]
    again = run(other)
    assert {name: o.folder for name, o in again.items()} == {name: o.folder for name, o in two.items()}


def test_shown(store: Store) -> None:
    put(store, users=("one", "two"))
    (store.runs / "two" / "run.json").write_text(json.dumps({"started": "2026-01-01", "finished": "2026-01-02"}))
    said = shown(store)
    assert "| merge | 0123456789ab | complete |" in said and "| one, two |" in said
    assert "| two | 2026-01-01 | 2026-01-02 |" in said
    content = json.loads(shown(store, "--json"))
    assert content["artifacts"][0]["fingerprint"] == PRINT and content["artifacts"][0]["runs"] == ["one", "two"]
    assert content["runs"][0]["completed"] == {"merge": True} and content["runs"][0]["finished"] is None
    assert age(30) == "30 s" and age(7300) == "2 h" and age(200000) == "2 d"


ROWS = [
    {"configuration": "model", "accuracy": 0.9, "perplexity": 5.0, "sparsity": 0.0},
    {"configuration": "merge", "accuracy": 0.314, "perplexity": 7.125, "sparsity": 0.5},
]


def ended(store: Store, name: str, report: str | None, finished: str = "2026-01-02") -> None:
    """A run that ended at that time, and its report."""
    (store.runs / name).mkdir(parents=True)
    (store.runs / name / "plan.json").write_text(json.dumps([{"name": "merge", "fingerprint": PRINT}]))
    record = {"started": "2026-01-01", "finished": finished, "artifacts": {}}
    (store.runs / name / "run.json").write_text(json.dumps(record))
    if report is not None:
        (store.runs / name / "report.json").write_text(report)


def test_results_of_runs_are_those_of_the_last_model(store: Store) -> None:
    put(store)
    ended(store, "tiny-1", json.dumps({"rows": ROWS}))
    ended(store, "tiny-2", json.dumps({"rows": ROWS[:1]}), "2026-01-03")
    said = shown(store)
    assert "| run | started | finished | last model | accuracy | perplexity | sparsity | steps complete |" in said
    assert "| tiny-1 | 2026-01-01 | 2026-01-02 | merge | 31.4% | 7.12 | 50.00% | 1 of 1 |" in said
    assert "| tiny-2 | 2026-01-01 | 2026-01-03 | model | 90.0% | 5.00 | 0.00% | 1 of 1 |" in said
    runs = json.loads(shown(store, "--json"))["runs"]
    assert [run["result"] for run in runs] == [ROWS[1], ROWS[0]]


@pytest.mark.parametrize(
    "report",
    [None, "{", "7", "[" * 100_000, '{"rows": []}', '{"rows": [3]}', '{"rows": [{"accuracy": 0.5}]}'],
)
def test_a_report_that_says_nothing(store: Store, report: str | None) -> None:
    put(store)
    ended(store, "bad", report)
    ended(store, "good", json.dumps({"rows": ROWS}))
    assert "| bad | 2026-01-01 | 2026-01-02 | – | – | – | – | 1 of 1 |" in shown(store)
    assert json.loads(shown(store, "--json"))["runs"][0]["result"] is None


@pytest.mark.parametrize("value", ["missing", None, "high", float("nan"), float("inf"), {}])
def test_a_number_of_the_report_that_is_none(store: Store, value: Any) -> None:
    row = {**ROWS[1], "accuracy": value}
    if value == "missing":
        del row["accuracy"]
    ended(store, "run", json.dumps({"rows": [row]}))
    ended(store, "good", json.dumps({"rows": ROWS}))
    assert "| run | 2026-01-01 | 2026-01-02 | merge | – | 7.12 | 50.00% |" in shown(store)
    assert json.loads(shown(store, "--json"))["runs"][1]["result"]["accuracy"] is None


def test_a_run_that_has_not_ended_shows_no_result(store: Store) -> None:
    """Its folder may hold the report of an earlier attempt."""
    put(store, users=("run",))
    (store.runs / "run" / "report.json").write_text(json.dumps({"rows": ROWS}))
    assert not scan_store(store).results and "31.4%" not in shown(store)


def test_unfinished_work(store: Store) -> None:
    """It goes when nobody holds it, whether a run would go on from it or not; and is shown as what it is."""
    with store.begin("finetune", PRINT) as scratch:
        (scratch / "part").write_bytes(b"x" * 10)
        held = only(store)
        assert held.in_work and not held.prunable and held.state == "unfinished"
        assert held.kept == "being made at this moment"
        assert "| unfinished, being made |" in shown(store)
        assert prune(store, [held]) == [] and scratch.is_dir()
    held = only(store)
    assert held.prunable and held.size == 10
    assert prune(store, [held]) == [held] and not held.folder.exists()


def shown(store: Store, *arguments: str) -> str:
    done = CliRunner().invoke(main, ["status", "--store", str(store.root), *arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_what_a_run_that_goes_on_builds_on(store: Store) -> None:
    """Its folder may be gone: the lock says that it has not ended."""
    folder, other = put(store), put(store, "sparsify", users=("run",))
    with store.using("merge", PRINT):
        held = next(one for one in scan_store(store).artifacts if one.stage == "merge")
        assert held.in_use and not held.in_work and not held.prunable
        assert "| complete, in use |" in shown(store)
        said = shown(store, "--prune", "--yes")
        assert "deleted 0 folders" in said and folder.is_dir()
        assert f"kept {folder}: in use at this moment" in said and f"kept {other}: needed by run" in said
        content = json.loads(shown(store, "--json"))["artifacts"]
        assert [one["kept"] for one in content] == ["in use at this moment", "needed by run"]
    said = shown(store, "--prune", "--yes")
    assert "deleted 1 folders" in said and not folder.exists() and f"kept {other}" in said


def test_a_run_that_comes_while_it_is_pruned(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = put(store)
    monkeypatch.setattr(Store, "remove", lambda *_: False)
    assert f"kept {folder}: a run was busy with it a moment ago" in shown(store, "--prune", "--yes")


def test_nothing_of_a_run_that_works_in_another_process(store: Store) -> None:
    folder = put(store)
    code = (
        "import sys; from sqft.store import Store\n"
        f"with Store(sys.argv[1]).begin('merge', {PRINT!r}): print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        held = only(store)
        assert held.in_work and not held.prunable and prune(store, [held]) == []
        process.communicate("")
    assert folder.is_dir() and only(store).prunable


def test_a_run_that_came_to_need_it_meanwhile(store: Store) -> None:
    folder = put(store)
    held = only(store)
    assert held.prunable
    put(store, "sparsify", users=("new",))
    (store.runs / "new" / "plan.json").write_text(json.dumps([{"name": "merge", "fingerprint": PRINT}]))
    assert prune(store, [held]) == [] and folder.is_dir()


@pytest.mark.parametrize("users", [(), ("run",)])
def test_damage_is_shown_and_kept_while_a_run_refers_to_it(store: Store, users: tuple[str, ...]) -> None:
    folder = put(store, users=users)
    (folder / "weights.bin").write_bytes(b"y")
    held = only(store)
    assert held.state == "damaged" and "weights.bin is not the file that was stored" in held.problem
    assert held.prunable == (not users)
    (folder / "manifest.json").unlink()
    assert "No such file" in only(store).problem
    assert CliRunner().invoke(main, ["status", "--store", str(store.root)]).exit_code == 0


@pytest.mark.parametrize("content", ["{", '[{"name": "merge"}]', "7"])
def test_nothing_is_deleted_while_a_run_cannot_be_read(store: Store, content: str) -> None:
    folder = put(store, users=("run",))
    (store.runs / "run" / "plan.json").write_text(content)
    assert "plan.json is damaged" in scan_store(store).runs[0].problem
    with pytest.raises(SqftError, match="which artifacts run run needs"):
        prune(store, [only(store)])
    done = CliRunner().invoke(main, ["status", "--store", str(store.root), "--prune", "--yes"])
    assert done.exit_code == 2 and folder.is_dir()


def test_a_deletion_that_was_killed_is_finished(store: Store) -> None:
    folder = put(store)
    folder.rename(folder.with_name(f".gone-{folder.name}"))
    held = only(store)
    assert held.state == "unfinished" and held.problem == "deleted in part"
    put(store)
    assert prune(store, [held]) == [held] and only(store).state == "complete"


def test_what_is_not_the_stores_is_left_alone(store: Store) -> None:
    put(store, users=("run",))
    (store.artifacts / "my-notes").mkdir()
    assert only(store).name == "merge-0123456789ab"
    missing = CliRunner().invoke(main, ["status", "--store", str(store.root / "nowhere")])
    assert missing.exit_code == 2 and "there is no store" in missing.stderr
