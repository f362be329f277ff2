"""The store alone: whole artifacts or none, damage found and named, one maker at a time."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sqft.errors import ArtifactError, StoreError
from sqft.store.artifacts import Artifact, Store, manifest_checksum
from sqft.utils.files import write_json

PRINT = "0123456789abcdef" * 4
START = "import os, signal, sys; from pathlib import Path; from sqft.store import artifacts as s\n"
START += "st = s.Store(sys.argv[1])\n"
MANIFEST = {"stage": "merge", "fingerprint": PRINT, "report": {"sparsity": 0.5}}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def fill(folder: Path) -> None:
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "weights.bin").write_bytes(b"abcd")
    (folder / "choice.json").write_text("{}")


def make(store: Store) -> Artifact:
    with store.begin("merge", PRINT) as scratch:
        fill(scratch)
        return store.commit(scratch, MANIFEST)


def edit(artifact: Artifact, **changes: Any) -> None:
    """Change a manifest as somebody would who seals it again."""
    path = artifact.folder / "manifest.json"
    manifest = {key: value for key, value in json.loads(path.read_text()).items() if key != "checksum"} | changes
    path.write_text(json.dumps(manifest | {"checksum": manifest_checksum(manifest)}))


@contextmanager
def another_process(store: Store, code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has the module as `s`, the store as `st`, and says when it is ready by a line."""
    command = [sys.executable, "-c", START + code, str(store.root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield process


def test_what_is_committed_is_found_whole(store: Store) -> None:
    assert store.find("merge", PRINT) is None
    made = make(store)
    found = store.find("merge", PRINT)
    assert found == made
    assert found.folder == store.folder("merge", PRINT) and found.folder.name == "merge-0123456789ab"
    assert found.report == {"sparsity": 0.5} and found.size == 6 and found.read_json("choice.json") == {}
    assert found.manifest["files"].keys() == {"model/weights.bin", "choice.json"}
    store.verify(found)
    assert [p.name for p in store.artifacts.iterdir() if p.name != ".locks"] == [found.folder.name]
    assert store.find("merge", "f" * 64) is None and store.find("sparsify", PRINT) is None


@pytest.mark.parametrize("at", ["", "manifest.json", "merge-0123456789ab"])
def test_killed_before_the_last_rename_leaves_no_artifact_and_the_next_try_is_whole(store: Store, at: str) -> None:
    code = f"""
at, die, replace = {at!r}, lambda: os.kill(os.getpid(), signal.SIGKILL), os.replace
def dying(a, b):
    if Path(b).name == at: die()
    replace(a, b)
os.replace = dying
with st.begin("merge", {PRINT!r}) as scratch:
    (scratch / "choice.json").write_text("{{}}")
    if not at: die()
    st.commit(scratch, {MANIFEST!r})
"""
    done = subprocess.run([sys.executable, "-c", START + code, str(store.root)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert store.find("merge", PRINT) is None
    with store.begin("merge", PRINT) as scratch:
        assert (scratch / "choice.json").is_file(), "what an earlier try left is kept for the stage to use"
    again = make(store)
    assert again.manifest["files"].keys() == {"model/weights.bin", "choice.json"}
    assert store.find("merge", PRINT) == again
    store.verify(again)


def test_the_disk_has_all_of_it_before_the_name(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file and folder is synced, then the artifact is renamed, then the folder that holds its name is."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        events.append(f"to {target.name}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    make(store)
    last = events.index("to merge-0123456789ab")
    assert {"weights.bin", "choice.json", "model", ".partial-merge-0123456789ab"} <= set(events[:last])
    assert events.index("to manifest.json") < events.index(".partial-merge-0123456789ab")
    assert events[last + 1 :] == ["artifacts"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": 2}, r"is of schema 2, this sqft reads 1"),
        ({"fingerprint": "0123456789ab" + "0" * 52}, "another fingerprint"),
        ({"files": {"gone": {"size": 1, "sha256": "x"}}}, "is damaged .*No such file"),
        ({"files": {"choice.json": {"size": 3, "sha256": "x"}}}, r"choice\.json is not the file that was stored"),
        ({"files": {"../../outside": {"size": 3, "sha256": "x"}}}, "leads out of it"),
        ({"files": {"model/../choice.json": {"size": 2, "sha256": "x"}}}, "leads out of it"),
        ({"files": {"/etc/hostname": {"size": 3, "sha256": "x"}}}, "leads out of it"),
        ({"files": {"model/weights.bin": {}}}, "is damaged"),
        ({"files": ["choice.json"]}, "is damaged"),
        ({"report": None}, "is damaged"),
        ({"stage": "search"}, "is damaged"),
        ({"files": None}, "is damaged"),
    ],
)
def test_a_manifest_that_is_not_right_is_refused_with_a_remedy(store: Store, changes: Any, message: str) -> None:
    artifact = make(store)
    (store.root / "outside").write_text("123")
    edit(artifact, **changes)
    with pytest.raises(ArtifactError, match=message) as caught:
        store.find("merge", PRINT)
    assert str(artifact.folder) in str(caught.value)
    assert str(caught.value).endswith("; delete that folder, or run with --fresh merge")


def test_a_manifest_that_was_edited_is_damage_and_one_without_a_checksum_is_an_old_one(store: Store) -> None:
    path = make(store).folder / "manifest.json"
    path.write_text(path.read_text().replace('"sparsity": 0.5', '"sparsity": 0.7'))
    with pytest.raises(ArtifactError, match=r"manifest\.json has changed since it was stored .*--fresh merge"):
        store.find("merge", PRINT)
    manifest = json.loads(path.read_text())
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    assert (found := store.find("merge", PRINT)) and found.report == {"sparsity": 0.7}


@pytest.mark.parametrize("place", ["more.txt", "model/weights.bin2", "model/.more.safetensors", "below/more"])
def test_verify_finds_what_was_added(store: Store, place: str) -> None:
    """A stage that reads every .safetensors of a folder would read it."""
    artifact = make(store)
    (artifact.folder / place).parent.mkdir(exist_ok=True)
    (artifact.folder / place).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=rf"{place} is not part of what was stored; move it .*--fresh merge"):
        store.verify(artifact)


@pytest.mark.parametrize("content", [None, "", "[]", '{"schema": 1', "\udcff", "[" * 100_000])
def test_a_manifest_that_is_none_is_damage(store: Store, content: str | None) -> None:
    path = make(store).folder / "manifest.json"
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ArtifactError, match="is damaged"):
        store.find("merge", PRINT)


@pytest.mark.parametrize("content", [None, b"abc", b"abcde"])
def test_a_file_missing_or_of_another_size_is_damage(store: Store, content: bytes | None) -> None:
    file = make(store).folder / "model" / "weights.bin"
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"weights\.bin.*--fresh merge"):
        store.find("merge", PRINT)


@pytest.mark.parametrize("linked", ["model", "model/weights.bin"])
def test_a_link_put_for_a_file_is_damage(store: Store, linked: str) -> None:
    place = make(store).folder / linked
    place.rename(store.root / "elsewhere")
    place.symlink_to(store.root / "elsewhere")
    with pytest.raises(ArtifactError, match="is a link"):
        store.find("merge", PRINT)


def test_a_stage_that_leaves_a_link_gets_no_artifact(store: Store) -> None:
    with store.begin("merge", PRINT) as scratch:
        fill(scratch)
        (scratch / "model" / "more.bin").symlink_to("weights.bin")
        with pytest.raises(ArtifactError, match=r"more\.bin is a link.*write or copy"):
            store.commit(scratch, MANIFEST)
    assert store.find("merge", PRINT) is None


def test_an_artifacts_folder_may_itself_be_a_link(store: Store) -> None:
    artifact = make(store)
    artifact.folder.rename(store.root / "on-another-disk")
    artifact.folder.symlink_to(store.root / "on-another-disk")
    assert store.find("merge", PRINT) == artifact


def test_a_file_named_as_the_manifest_deeper_down_is_a_file_like_others(store: Store) -> None:
    with store.begin("merge", PRINT) as scratch:
        fill(scratch)
        (scratch / "model" / "manifest.json").write_text("{}")
        artifact = store.commit(scratch, MANIFEST)
    assert "model/manifest.json" in artifact.manifest["files"]


def test_what_a_killed_try_left_half_written_is_no_part_of_it(store: Store) -> None:
    with store.begin("merge", PRINT) as scratch:
        fill(scratch)
        (scratch / "model" / ".tmp8dY5Vm").write_bytes(b"safetensors wrote this much")
        (scratch / ".choice.json.123.tmp").write_text("{")
        (scratch / "model" / ".keep").write_text("")
        artifact = store.commit(scratch, MANIFEST)
    assert artifact.manifest["files"].keys() == {"model/weights.bin", "choice.json", "model/.keep"}
    assert {file.name for file in artifact.folder.rglob(".*")} == {".keep"}


def test_files_are_as_readable_as_their_folder(store: Store) -> None:
    with store.begin("merge", PRINT) as scratch:
        scratch.chmod(0o750)
        save_file({"x": torch.zeros(2)}, scratch / "x.safetensors")
        (scratch / "x.safetensors").chmod(0o600)
        artifact = store.commit(scratch, MANIFEST)
    assert (artifact.folder / "x.safetensors").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("settled", [True, False])
def test_verify_finds_a_changed_byte(store: Store, monkeypatch: pytest.MonkeyPatch, settled: bool) -> None:
    """Written in place, of the same size, with the old time put back; and also with no wait in between."""
    if settled:
        monkeypatch.setattr("sqft.utils.digests.SETTLED", 0)
    artifact = make(store)
    store.verify(artifact)
    file = artifact.folder / "model" / "weights.bin"
    times = file.stat()
    if settled:
        time.sleep(0.02)  # more than a tick of the clock
    with file.open("r+b") as stream:
        stream.write(b"x")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    found = store.find("merge", PRINT)
    assert found
    with pytest.raises(ArtifactError, match=r"weights\.bin has changed .*checksum.*--fresh merge"):
        store.verify(found)
    with pytest.raises(ArtifactError):
        Store(store.root).verify(found)


def test_a_checksum_that_is_missing_does_not_match(store: Store) -> None:
    artifact = make(store)
    edit(artifact, files={"choice.json": {"size": 2}})
    found = store.find("merge", PRINT)
    assert found
    with pytest.raises(ArtifactError, match="has changed"):
        store.verify(found)


def test_a_second_run_waits_and_then_finds_it(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    code = f"""
with st.begin("merge", {PRINT!r}) as scratch:
    print("ready", flush=True)
    sys.stdin.readline()
    st.commit(scratch, {MANIFEST!r})
"""
    found: list[tuple[Artifact | None, bool]] = []

    def second() -> None:
        with store.begin("merge", PRINT) as scratch:
            found.append((store.find("merge", PRINT), scratch.exists()))

    caplog.set_level(logging.INFO, "sqft")
    with another_process(store, code) as process:
        with store.begin("merge", "f" * 64):
            pass  # another artifact is nobody's business
        waiting = threading.Thread(target=second)
        waiting.start()
        until = time.monotonic() + 60
        while not caplog.messages and time.monotonic() < until:
            time.sleep(0.01)
        assert caplog.messages == ["another run works on merge-0123456789ab; waiting for it"] and not found
        process.communicate("\n")
        waiting.join()
    assert found == [(store.find("merge", PRINT), False)] and found[0][0] is not None


def test_the_lock_of_a_killed_run_is_free(store: Store) -> None:
    code = f"with st.begin('merge', {PRINT!r}): print('ready', flush=True); sys.stdin.read()"
    with another_process(store, code) as process:
        process.kill()
    make(store)


def test_discard_forgets_what_is_done_and_what_was_begun(store: Store) -> None:
    store.discard("merge", PRINT)
    assert not store.root.exists(), "to forget nothing makes no store"
    make(store)
    store.discard("merge", PRINT)
    assert store.find("merge", PRINT) is None
    with store.begin("merge", PRINT) as scratch:
        assert not list(scratch.iterdir())
        fill(scratch)
    store.discard("merge", PRINT)
    assert not scratch.exists()


def test_killed_while_it_forgets_it_has_forgotten(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of an artifact under its own name would be damage."""
    artifact, rmtree = make(store), shutil.rmtree

    def interrupted(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            (folder / "manifest.json").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store.discard("merge", PRINT)
    monkeypatch.setattr(shutil, "rmtree", rmtree)
    assert store.find("merge", PRINT) is None
    again = make(store)
    assert again.manifest == artifact.manifest
    assert [p.name for p in store.artifacts.iterdir() if p.name != ".locks"] == [again.folder.name]


def test_killed_before_checkpoints_are_gone_the_next_run_sees_to_it(store: Store) -> None:
    artifact = make(store)
    (artifact.folder / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    (artifact.folder / "checkpoints" / "checkpoint-2" / "optimizer.pt").write_bytes(b"x")
    store.verify(artifact)
    with store.begin("merge", PRINT):
        pass
    assert not (artifact.folder / "checkpoints").exists() and store.find("merge", PRINT) == artifact


def test_discard_waits_for_a_run_that_uses_it(store: Store) -> None:
    artifact = make(store)
    code = f"with st.using('merge', {PRINT!r}): print('ready', flush=True); sys.stdin.read()"
    with another_process(store, code) as process:
        with store.using("merge", PRINT), store.begin("merge", PRINT):
            pass  # to use it is nobody's hindrance
        forgetting = threading.Thread(target=store.discard, args=("merge", PRINT))
        forgetting.start()
        forgetting.join(0.3)
        assert forgetting.is_alive() and artifact.folder.exists()
        process.kill()
        forgetting.join(60)
    assert not artifact.folder.exists()


def test_discard_waits_for_a_run_that_makes_it(store: Store) -> None:
    code = f"""
with st.begin("merge", {PRINT!r}) as scratch:
    (scratch / "a").write_text("")
    print("ready", flush=True)
    sys.stdin.readline()
    (scratch / "b").write_text("")
    st.commit(scratch, {MANIFEST!r})
"""
    with another_process(store, code) as process:
        discarding = subprocess.Popen([sys.executable, "-c", START + f"st.discard('merge', {PRINT!r})", store.root])
        time.sleep(0.7)
        process.communicate("\n")
        assert process.returncode == 0
        assert discarding.wait() == 0
    assert store.find("merge", PRINT) is None


def test_a_store_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    store = Store(tmp_path / "file" / "store")
    assert store.find("merge", PRINT) is None
    with pytest.raises(StoreError, match=r"the store .*file/store cannot be written: Not a directory.*--store"):
        make(store)


def test_an_artifact_that_cannot_be_forgotten_is_an_error(store: Store) -> None:
    """Else `--fresh` would find it again and call it fresh."""
    artifact = make(store)
    artifact.folder.rename(store.root / "on-another-disk")
    artifact.folder.symlink_to(store.root / "on-another-disk")
    with pytest.raises(StoreError, match="cannot be written"):
        store.discard("merge", PRINT)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_is_the_users_to_mend_and_what_was_begun_stays(store: Store) -> None:
    with pytest.raises(StoreError, match=r"merge: there is no room left .*No space left on device.*--store.*repeat"):
        with store.begin("merge", PRINT) as scratch:
            fill(scratch)
            Path("/dev/full").write_text("x")
    assert (scratch / "choice.json").is_file()


def test_a_full_disk_in_safetensors_words(store: Store) -> None:
    from safetensors import SafetensorError

    with pytest.raises(StoreError, match="no room left"):
        with store.begin("merge", PRINT):
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_a_full_disk_behind_torchs_words(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.save` on a full disk says only this, and leaves what it wrote."""
    with pytest.raises(StoreError, match=r"no room left .*unexpected pos"):
        with store.begin("merge", PRINT):
            monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0))
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")


@pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file"), RuntimeError("a bug"), ArtifactError("told")])
def test_other_errors_pass_as_they_are(store: Store, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        with store.begin("merge", PRINT):
            raise error
    assert caught.value is error


def test_write_json_leaves_the_old_file_or_the_new(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "ä"})
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_json(path, {"a": [1] * 10_000, "b": object()})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    write_json(path, [1])
    assert json.loads(path.read_text()) == [1]


def test_two_processes_may_write_one_file(store: Store) -> None:
    store.root.mkdir()
    code = "print('ready', flush=True)\nfor n in range(200): s.write_json(Path(sys.argv[1]) / 'a.json', [n] * 2000)"
    with another_process(store, code) as process:
        while process.poll() is None:
            write_json(store.root / "a.json", ["here"] * 2000)
            assert len(json.loads((store.root / "a.json").read_text())) == 2000
        assert process.returncode == 0
    assert [file.name for file in store.root.iterdir()] == ["a.json"]
