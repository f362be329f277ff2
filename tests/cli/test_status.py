"""sqft status: the tables, the question before anything is deleted, and what is said of what is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from sqft.cli import main
from sqft.store.artifacts import Store

FINGERPRINT = "0123456789ab" + "c" * 52


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one artifact that no run needs."""
    store = Store(tmp_path / "store")
    with store.begin("merge", FINGERPRINT) as scratch:
        (scratch / "weights.bin").write_bytes(b"x" * 1000)
        store.commit(scratch, {"stage": "merge", "fingerprint": FINGERPRINT, "report": {}})
    return store


def test_the_command_asks(store: Store) -> None:
    (folder,) = store.artifacts.glob("merge-*")
    arguments = ["status", "--store", str(store.root), "--prune"]
    refused = CliRunner().invoke(main, arguments, input="n\n")
    assert refused.exit_code == 0 and folder.is_dir() and str(folder) in refused.stderr and "KiB" in refused.stderr
    silent = CliRunner().invoke(main, arguments)
    assert silent.exit_code == 2 and folder.is_dir() and "--yes" in silent.stderr
    agreed = CliRunner().invoke(main, [*arguments, "--json"], input="y\n")
    assert json.loads(agreed.stdout)["deleted"] == [folder.name] and not folder.exists()


def test_tables_and_sizes(store: Store) -> None:
    arguments = ["status", "--store", str(store.root)]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0 and "# artifacts" in shown.output and "| merge | 0123456789ab |" in shown.output
    assert "; --prune would delete 1 KiB" in shown.output
    content = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert [one["fingerprint"] for one in content["artifacts"]] == [FINGERPRINT] and "deleted" not in content


def test_what_is_deleted_and_what_is_kept(store: Store) -> None:
    (store.runs / "tiny").mkdir(parents=True)
    (store.runs / "tiny" / "plan.json").write_text(json.dumps([{"name": "merge", "fingerprint": FINGERPRINT}]))
    arguments = ["status", "--store", str(store.root), "--prune", "--yes"]
    kept = CliRunner().invoke(main, arguments)
    (folder,) = store.artifacts.glob("merge-*")
    assert kept.output.endswith(f"deleted 0 folders, 0 B\nkept {folder}: needed by tiny\n")
    (store.runs / "tiny" / "plan.json").write_text("[]")
    assert "deleted 1 folders, 1 KiB\n" in CliRunner().invoke(main, arguments).output and not folder.exists()


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    missing = CliRunner().invoke(main, ["status", "--store", str(tmp_path / "nowhere")])
    assert missing.exit_code == 2 and "there is no store" in missing.stderr
