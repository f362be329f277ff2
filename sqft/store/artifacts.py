"""Content-addressed artifacts, each of which is complete or does not exist.

An artifact is written into `.partial-…`, its manifest last, and then renamed; all of it reaches the
disk before the rename does. Nothing else in the store is ever trusted. Two locks for each artifact,
one to make it and one to use it, let several runs share one store.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.errors import ArtifactError, SqftError, StoreError
from sqft.store.locks import Locks
from sqft.utils.digests import Digests
from sqft.utils.files import CHECKPOINTS, MANIFEST, reason, sync, write_json

SCHEMA = 1
"""The version of the manifest's format."""
USERS_LOCK = ".used"
"""Suffix of an artifact's second lock. The first, NAME, is held by the run that makes the artifact; NAME.used is shared
by all runs that use it."""
INCOMPLETE_PREFIX = re.compile(r"^\.(partial|gone)-")
"""Prefix of an artifact's folder while it is being made (partial) or deleted (gone)."""
TEMPORARY_FILES = (".*.tmp", ".tmp??????")
"""Names that `write_json` and safetensors give to files that are being written; a killed run leaves them behind."""
LEAST_ROOM = 1 << 20
"""Bytes free below which a disk counts as full."""


@dataclass(frozen=True)
class Artifact:
    """A finished step's folder and its manifest."""

    folder: Path
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        return f"<Artifact {self.folder}>"

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
        """Return the content of one of its JSON files."""
        return json.loads((self.folder / name).read_text("utf-8"))


class Store:
    """The artifacts and runs under one folder."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self.artifacts = self.root / "artifacts"
        self.runs = self.root / "runs"
        self.digests = Digests(self.root / "known-digests.json")
        self._locks = Locks(self.artifacts / ".locks", self.writing)

    def folder(self, stage: str, fingerprint: str) -> Path:
        """Return where an artifact lies once it is complete."""
        return self.artifacts / name_of(stage, fingerprint)

    def partial(self, stage: str, fingerprint: str) -> Path:
        """Return where an artifact is made: for the holder of its lock, and the processes that help it."""
        return self.artifacts / f".partial-{name_of(stage, fingerprint)}"

    def _gone(self, name: str) -> Path:
        """Return a folder's name during its deletion, so that a kill leaves no half of an artifact under its own."""
        return self.artifacts / f".gone-{name}"

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """Return the artifact with that fingerprint, or None when it was never finished.

        Raises:
            ArtifactError: when it exists but is damaged (a file missing, of another size, or elsewhere).
            StoreError: when the store cannot be read.
        """
        folder = self.folder(stage, fingerprint)
        with self._access("read"):
            exists = folder.is_dir()
        return self._open(folder, fingerprint) if exists else None

    def is_complete(self, stage: str, fingerprint: str) -> bool:
        """Return whether `find` would return an artifact; a damaged one counts as missing here."""
        try:
            return self.find(stage, fingerprint) is not None
        except ArtifactError:
            return False

    def _open(self, folder: Path, fingerprint: str) -> Artifact:
        remedy = f"delete that folder, or run with --fresh {_stage(folder)}"
        try:
            root = folder.resolve()
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            checksum = manifest.pop("checksum", None)
            if manifest["schema"] != SCHEMA:
                raise ArtifactError(f"{folder} is of schema {manifest['schema']}, this sqft reads {SCHEMA}; {remedy}")
            if manifest["fingerprint"] != fingerprint:
                raise ArtifactError(f"{folder} belongs to another fingerprint; {remedy}")
            if not isinstance(manifest["report"], dict) or manifest["stage"] != _stage(folder):
                raise ArtifactError(f"{folder} is damaged (its manifest does not belong to this step); {remedy}")
            for name, entry in manifest["files"].items():
                file = root / name
                if not file.is_relative_to(root) or file.resolve() != file:  # "..", an absolute path, a link
                    raise ArtifactError(f"{folder} is damaged ({name} leads out of it, or is a link); {remedy}")
                if file.stat().st_size != entry["size"]:
                    raise ArtifactError(f"{folder / name} is not the file that was stored (size); {remedy}")
            if checksum not in (None, manifest_checksum(manifest)):  # the first artifacts have none
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
        remedy = f"or run with --fresh {_stage(folder)}"
        for name, entry in files.items():
            if self.digests.file(folder / name) != entry.get("sha256"):
                raise ArtifactError(
                    f"{folder / name} has changed since it was stored (checksum); delete {folder}, {remedy}"
                )
        known = {folder / name for name in (*files, MANIFEST)}
        for path in _content(folder):  # a stage that reads a folder would read what was put there later
            if path not in known and not path.is_dir():
                raise ArtifactError(f"{path} is not part of what was stored; move it elsewhere, {remedy}")

    @contextmanager
    def begin(self, stage: str, fingerprint: str) -> Iterator[Path]:
        """Give the scratch folder in which to make an artifact, kept from an earlier attempt if there was one.

        Held under a lock: a second run that wants the same artifact waits here, and then finds it.

        Raises:
            StoreError: when the store cannot be written, or its disk is full before the work is done.
        """
        partial, name = self.partial(stage, fingerprint), name_of(stage, fingerprint)
        with self._locks.hold(name):
            if not (folder := self.folder(stage, fingerprint)).exists():
                with self.writing():
                    partial.mkdir(exist_ok=True)
            for leftover in (folder / CHECKPOINTS, self._gone(name)):  # of a run that was killed
                shutil.rmtree(leftover, ignore_errors=True)
            try:
                yield partial
            except SqftError:
                raise
            except Exception as error:
                if not self._is_full(error):
                    raise
                raise StoreError(
                    f"{stage}: there is no room left to write in ({reason(error)}); make room for the store "
                    f"{self.root}, or name another with --store, and repeat the command: finished steps are kept"
                ) from error

    def commit(self, partial: Path, manifest: dict[str, Any]) -> Artifact:
        """Turn a scratch folder into an artifact: sizes and checksums, manifest last, then one rename.

        Raises:
            ArtifactError: when the stage left a link, which could later lead out of the artifact.
        """
        for pattern in TEMPORARY_FILES:
            for file in list(partial.rglob(pattern)):
                file.unlink()
        entries, readable = {}, partial.stat().st_mode & 0o444
        paths = _content(partial)
        for path in paths:
            if path.is_symlink():
                raise ArtifactError(f"{path} is a link; an artifact must hold its files itself: write or copy the file")
            if path.is_dir() or path == partial / MANIFEST:
                continue
            if missing := readable & ~path.stat().st_mode:  # safetensors makes its files readable by their owner alone
                path.chmod(path.stat().st_mode | missing)
            sync(path)
            name = path.relative_to(partial).as_posix()
            entries[name] = {"size": path.stat().st_size, "sha256": self.digests.file(path)}
        manifest = json.loads(json.dumps({"schema": SCHEMA, **manifest, "files": entries}))  # as it will be read
        write_json(partial / MANIFEST, manifest | {"checksum": manifest_checksum(manifest)})
        for folder in (*filter(Path.is_dir, paths), partial):
            sync(folder)
        folder = self.folder(manifest["stage"], manifest["fingerprint"])
        os.replace(partial, folder)
        sync(self.artifacts)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
        return Artifact(folder, manifest)

    def using(self, stage: str, fingerprint: str) -> AbstractContextManager[bool]:
        """Keep other runs from deleting an artifact while the block runs. Enter it while `begin` holds the artifact."""
        return self._locks.hold(name_of(stage, fingerprint) + USERS_LOCK, shared=True)

    def discard(self, stage: str, fingerprint: str) -> None:
        """Delete an artifact and any unfinished work on it; waits while another run makes or uses it."""
        if not self.artifacts.is_dir():
            return
        name = name_of(stage, fingerprint)
        with self._locks.hold(name), self._locks.hold(name + USERS_LOCK), self.writing():
            for folder in (self.folder(stage, fingerprint), self.partial(stage, fingerprint)):
                if folder.is_symlink():
                    raise OSError(errno.ELOOP, "a link cannot be deleted", str(folder))
                gone = self._gone(name)
                shutil.rmtree(gone, ignore_errors=True)
                if folder.exists():
                    folder.rename(gone)
                    shutil.rmtree(gone)

    def remove(self, folder: Path, unless: Callable[[], bool]) -> bool:
        """Delete a folder of `artifacts`, finished or not, and return whether it was deleted.

        It is kept when another run holds it, or when `unless` returns true. `unless` is called under the locks, when no
        run can begin to use the folder.
        """
        name = INCOMPLETE_PREFIX.sub("", folder.name)
        making, using = self._locks.hold(name, wait=False), self._locks.hold(name + USERS_LOCK, wait=False)
        with making as not_made, using as not_used, self.writing():
            if not (not_made and not_used) or unless():
                return False
            gone = folder.with_name(self._gone(name).name)
            if gone != folder:
                shutil.rmtree(gone, ignore_errors=True)
                os.replace(folder, gone)
            gone.unlink() if gone.is_symlink() else shutil.rmtree(gone, ignore_errors=not gone.exists())
        return True

    def is_being_made(self, name: str) -> bool:
        """Return whether a run makes, or opens, the artifact of that folder name at this moment."""
        return self._locks.is_exclusive(name)

    def is_used(self, name: str) -> bool:
        """Return whether a run that has not ended made that artifact or depends on it."""
        return self._locks.is_held(name + USERS_LOCK)

    def writing(self) -> AbstractContextManager[None]:
        """Turn an OSError inside the block into a StoreError that says what to do."""
        return self._access("written")

    @contextmanager
    def _access(self, how: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StoreError(
                f"the store {self.root} cannot be {how}: {reason(error)}; fix that, or name another with --store"
            ) from None

    def _is_full(self, error: Exception) -> bool:
        """Return whether a full disk caused an error.

        Python reports it by number, safetensors in words, and torch only leaves a disk without room.
        """
        if isinstance(error, OSError):
            return error.errno in (errno.ENOSPC, errno.EDQUOT)
        return "No space left on device" in str(error) or shutil.disk_usage(self.artifacts).free < LEAST_ROOM


def name_of(stage: str, fingerprint: str) -> str:
    """Return the name of an artifact's folder."""
    return f"{stage}-{fingerprint[:12]}"


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """Return the checksum of a manifest without its own entry "checksum"."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _stage(folder: Path) -> str:
    """Return the stage in the name of an artifact's folder."""
    return folder.name.rpartition("-")[0]


def _content(folder: Path) -> list[Path]:
    """Return all files and folders of an artifact, sorted; those below `CHECKPOINTS` are not part of it."""
    return sorted(path for path in folder.rglob("*") if folder / CHECKPOINTS not in (path, *path.parents))
