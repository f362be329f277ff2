"""What has been done: content-addressed artifacts that exist whole or not at all.

An artifact is written into `.partial-…`, its manifest last, and then renamed; all of it reaches the
disk before the rename does. Nothing else in the store is ever trusted. A lock for each artifact
lets two runs share one store.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from sqft.errors import ArtifactError, SqftError, StageError
from sqft.utils.digests import Digests
from sqft.utils.files import CHECKPOINTS, reason, sync, write_json


log = logging.getLogger("sqft")


SCHEMA = 1


MANIFEST = "manifest.json"


LOCKS = ".locks"


USED = ".used"
"""What a lock's name ends in that all runs share which use the artifact."""


LEFT = re.compile(r"^\.(partial|gone)-")
"""What precedes an artifact's name in the folder of one that was begun, or whose deletion was."""


UNFINISHED = (".*.tmp", ".tmp??????")
"""Files that an earlier try was killed in: names that `write_json` and safetensors give until a file is whole."""


@dataclass(frozen=True)
class Artifact:
    """A finished step's folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def report(self) -> dict[str, Any]:
        """What the stage measured."""
        report: dict[str, Any] = self.manifest["report"]
        return report

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(entry["size"] for entry in self.manifest["files"].values())

    def read_json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text("utf-8"))


class Store:
    """The artifacts and runs under one folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.artifacts = self.root / "artifacts"
        self.runs = self.root / "runs"
        self.digests = Digests(self.root / "digests.json")

    def folder(self, stage: str, fingerprint: str) -> Path:
        return self.artifacts / name_of(stage, fingerprint)

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The artifact with that fingerprint, or None when it was never finished.

        Raises:
            ArtifactError: when it is there but damaged (a file missing, of another size, or elsewhere).
            StageError: when the store cannot be read.
        """
        folder = self.folder(stage, fingerprint)
        with self.writing("read"):
            there = folder.is_dir()
        return self._open(folder, fingerprint) if there else None

    def _open(self, folder: Path, fingerprint: str) -> Artifact:
        remedy = f"delete that folder, or run with --fresh {folder.name.rpartition('-')[0]}"
        try:
            root = folder.resolve()
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            sealed = manifest.pop("checksum", None)
            if manifest["schema"] != SCHEMA:
                raise ArtifactError(f"{folder} is of schema {manifest['schema']}, this sqft reads {SCHEMA}; {remedy}")
            if manifest["fingerprint"] != fingerprint:
                raise ArtifactError(f"{folder} belongs to another fingerprint; {remedy}")
            if not isinstance(manifest["report"], dict) or manifest["stage"] != folder.name.rpartition("-")[0]:
                raise ArtifactError(f"{folder} is damaged (its manifest is none of this step); {remedy}")
            for name, entry in manifest["files"].items():
                file = root / name
                if not file.is_relative_to(root) or file.resolve() != file:  # "..", an absolute path, a link
                    raise ArtifactError(f"{folder} is damaged ({name} leads out of it, or is a link); {remedy}")
                if file.stat().st_size != entry["size"]:
                    raise ArtifactError(f"{folder / name} is not the file that was stored (size); {remedy}")
            if sealed not in (None, _seal(manifest)):  # the first artifacts have none
                raise ArtifactError(f"{folder / MANIFEST} has changed since it was stored (checksum); {remedy}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ArtifactError(f"{folder} is damaged ({reason(error)}); {remedy}") from None
        return Artifact(folder, manifest)

    def verify(self, artifact: Artifact) -> None:
        """Compare every file with the checksum it was stored with (remembered between runs).

        Raises:
            ArtifactError: naming the file that changed, or that was added.
        """
        folder, files = artifact.folder, artifact.manifest["files"]
        remedy = f"or run with --fresh {folder.name.rpartition('-')[0]}"
        for name, entry in files.items():
            if self.digests.file(folder / name) != entry.get("sha256"):
                raise ArtifactError(
                    f"{folder / name} has changed since it was stored (checksum); delete {folder}, {remedy}"
                )
        known = {folder / name for name in (*files, MANIFEST)}
        for place in _inside(folder):  # a stage that reads a folder would read what was put there later
            if place not in known and not place.is_dir():
                raise ArtifactError(f"{place} is no part of what was stored; move it elsewhere, {remedy}")

    def discard(self, stage: str, fingerprint: str) -> None:
        """Forget an artifact and whatever was begun of it; waits while another run makes or uses it."""
        if not self.artifacts.is_dir():
            return
        name = name_of(stage, fingerprint)
        with self._locked(name), self._locked(name + USED), self.writing():
            for folder in (self.folder(stage, fingerprint), self.partial(stage, fingerprint)):
                if folder.is_symlink():
                    raise OSError(errno.ELOOP, "a link cannot be forgotten", str(folder))
                gone = self._gone(name)
                shutil.rmtree(gone, ignore_errors=True)
                if folder.exists():
                    folder.rename(gone)
                    shutil.rmtree(gone)

    def using(self, stage: str, fingerprint: str) -> AbstractContextManager[bool]:
        """Keep an artifact from being forgotten by another run. To be entered while it is held by `begin`."""
        return self._locked(name_of(stage, fingerprint) + USED, how=fcntl.LOCK_SH)

    @contextmanager
    def begin(self, stage: str, fingerprint: str) -> Iterator[Path]:
        """The scratch folder of an artifact in the making, kept from an earlier try if there was one.

        Held under a lock: a second run that wants the same artifact waits here, and then finds it.

        Raises:
            StageError: when the store cannot be written, or its disk is full before the work is done.
        """
        partial, name = self.partial(stage, fingerprint), name_of(stage, fingerprint)
        with self._locked(name):
            if not (folder := self.folder(stage, fingerprint)).exists():
                with self.writing():
                    partial.mkdir(exist_ok=True)
            for left in (folder / CHECKPOINTS, self._gone(name)):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                yield partial
            except SqftError:
                raise
            except Exception as error:
                if not self._is_full(error):
                    raise
                raise StageError(
                    f"{stage}: there is no room left to write in ({reason(error)}); make room for the store "
                    f"{self.root}, or name another with --store, and repeat the command: what is done stays done"
                ) from error

    def commit(self, partial: Path, manifest: dict[str, Any]) -> Artifact:
        """Make a scratch folder an artifact: sizes and checksums, manifest last, then one rename.

        Raises:
            ArtifactError: when the stage left a link, which would lead out of the artifact one day.
        """
        for pattern in UNFINISHED:
            for file in list(partial.rglob(pattern)):
                file.unlink()
        entries, readable = {}, partial.stat().st_mode & 0o444
        places = _inside(partial)
        for place in places:
            if place.is_symlink():
                raise ArtifactError(
                    f"{place} is a link; an artifact must hold its files itself: write or copy the file"
                )
            if place.is_dir() or place == partial / MANIFEST:
                continue
            if missing := readable & ~place.stat().st_mode:  # safetensors gives its files to their owner alone
                place.chmod(place.stat().st_mode | missing)
            sync(place)
            name = place.relative_to(partial).as_posix()
            entries[name] = {"size": place.stat().st_size, "sha256": self.digests.file(place)}
        manifest = json.loads(json.dumps({"schema": SCHEMA, **manifest, "files": entries}))  # as it will be read
        write_json(partial / MANIFEST, manifest | {"checksum": _seal(manifest)})
        for folder in (*filter(Path.is_dir, places), partial):
            sync(folder)
        folder = self.folder(manifest["stage"], manifest["fingerprint"])
        os.replace(partial, folder)
        sync(self.artifacts)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return Artifact(folder, manifest)

    def is_held(self, name: str) -> bool:
        """Whether a run makes the artifact of that name at this moment, or opens it."""
        return self._is_locked(name, fcntl.LOCK_SH)

    def is_used(self, name: str) -> bool:
        """Whether a run that has not ended made that artifact or builds on it."""
        return self._is_locked(name + USED, fcntl.LOCK_EX)

    def _is_locked(self, name: str, how: int) -> bool:
        try:
            with (self.artifacts / LOCKS / name).open() as stream:
                fcntl.flock(stream, how | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock, so nobody has begun it
            return False
        return False

    def remove(self, folder: Path, unless: Callable[[], bool]) -> bool:
        """Delete a folder of artifacts, finished or not; whether it was done.

        It is not when another run holds it, or `unless`, asked when nobody can begin to use it any more.
        """
        name = LEFT.sub("", folder.name)
        held, used = self._locked(name, wait=False), self._locked(name + USED, wait=False)
        with held as free, used as unused, self.writing():
            if not (free and unused) or unless():
                return False
            gone = folder.with_name(self._gone(name).name)
            if gone != folder:
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(folder, gone)
            gone.unlink() if gone.is_symlink() else shutil.rmtree(gone, ignore_errors=not gone.exists())
        return True

    @contextmanager
    def _locked(self, name: str, wait: bool = True, how: int = fcntl.LOCK_EX) -> Iterator[bool]:
        """Hold a lock; where another run does, and we do not `wait`, False is what the block gets."""
        lock, free = self.artifacts / LOCKS / name, True
        with self.writing():
            lock.parent.mkdir(parents=True, exist_ok=True)
            stream = lock.open("w")
        with stream:
            with self.writing():
                try:
                    fcntl.flock(stream, how | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
                    if wait:
                        log.info("another run works on %s; waiting for it", lock.stem)
                        fcntl.flock(stream, how)
            yield free or wait

    @contextmanager
    def writing(self, how: str = "written") -> Iterator[None]:
        """What the system refuses inside becomes a StageError that says what to do."""
        try:
            yield
        except OSError as error:
            raise StageError(
                f"the store {self.root} cannot be {how}: {reason(error)}; mend that, or name another with --store"
            ) from None

    def _is_full(self, error: Exception) -> bool:
        """Whether a full disk is behind an error. Only Python says so by number: safetensors says it in words, and
        torch leaves no more than a disk without room."""
        if isinstance(error, OSError):
            return error.errno in (errno.ENOSPC, errno.EDQUOT)
        return "No space left on device" in str(error) or shutil.disk_usage(self.artifacts).free < 1 << 20

    def partial(self, stage: str, fingerprint: str) -> Path:
        """Where an artifact is in the making: for the holder of its lock, and processes that it asked to help."""
        return self.artifacts / f".partial-{name_of(stage, fingerprint)}"

    def _gone(self, name: str) -> Path:
        """What a folder is called while it is deleted: a kill in the middle leaves no half of an artifact."""
        return self.artifacts / f".gone-{name}"


def name_of(stage: str, fingerprint: str) -> str:
    """The name of an artifact's folder."""
    return f"{stage}-{fingerprint[:12]}"


def _seal(manifest: dict[str, Any]) -> str:
    """The checksum of all else that a manifest says."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _inside(folder: Path) -> list[Path]:
    """All files and folders of an artifact, in order: those below `CHECKPOINTS` are no part of it."""
    return sorted(place for place in folder.rglob("*") if folder / CHECKPOINTS not in (place, *place.parents))
