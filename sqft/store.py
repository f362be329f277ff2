"""What has been done: content-addressed artifacts that exist whole or not at all.

An artifact is written into `.partial-…`, its manifest last, and then renamed. Nothing else in the
store is ever trusted. A lock for each artifact lets two runs share one store.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqft.errors import ArtifactError, StageError
from sqft.source import Digests

SCHEMA = 1
MANIFEST = "manifest.json"


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
        return self.artifacts / f"{stage}-{fingerprint[:12]}"

    def find(self, stage: str, fingerprint: str) -> Artifact | None:
        """The artifact with that fingerprint, or None when it was never finished.

        Raises:
            ArtifactError: when it is there but damaged (a file missing or of another size).
        """
        folder = self.folder(stage, fingerprint)
        if not folder.is_dir():
            return None
        return self._open(folder, fingerprint)

    def _open(self, folder: Path, fingerprint: str) -> Artifact:
        remedy = f"delete that folder, or run with --fresh {folder.name.rpartition('-')[0]}"
        try:
            manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
            if manifest["schema"] != SCHEMA:
                raise ArtifactError(f"{folder} is of schema {manifest['schema']}, this sqft reads {SCHEMA}; {remedy}")
            if manifest["fingerprint"] != fingerprint:
                raise ArtifactError(f"{folder} belongs to another fingerprint; {remedy}")
            for name, entry in manifest["files"].items():
                if (folder / name).stat().st_size != entry["size"]:
                    raise ArtifactError(f"{folder / name} is not the file that was stored (size); {remedy}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ArtifactError(f"{folder} is damaged ({error}); {remedy}") from None
        return Artifact(folder, manifest)

    def verify(self, artifact: Artifact) -> None:
        """Compare every file with the checksum it was stored with (remembered between runs).

        Raises:
            ArtifactError: naming the file that changed.
        """
        for name, entry in artifact.manifest["files"].items():
            if self.digests.file(artifact.folder / name) != entry["sha256"]:
                stage = artifact.manifest["stage"]
                raise ArtifactError(
                    f"{artifact.folder / name} has changed since it was stored (checksum); "
                    f"delete {artifact.folder}, or run with --fresh {stage}"
                )

    def discard(self, stage: str, fingerprint: str) -> None:
        """Forget an artifact and whatever was begun of it."""
        for folder in (self.folder(stage, fingerprint), self._partial(stage, fingerprint)):
            shutil.rmtree(folder, ignore_errors=True)

    @contextmanager
    def begin(self, stage: str, fingerprint: str) -> Iterator[Path]:
        """The scratch folder of an artifact in the making, kept from an earlier try if there was one.

        Held under a lock: a second run that wants the same artifact waits here, and then finds it.
        """
        partial = self._partial(stage, fingerprint)
        lock = self.artifacts / ".locks" / f"{stage}-{fingerprint[:12]}"
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stream = lock.open("w")
        except OSError as error:
            raise StageError(f"the store {self.root} cannot be written: {error.strerror}") from None
        with stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if not self.folder(stage, fingerprint).exists():
                partial.mkdir(exist_ok=True)
            yield partial

    def commit(self, partial: Path, manifest: dict[str, Any]) -> Artifact:
        """Make a scratch folder an artifact: sizes and checksums, manifest last, then one rename."""
        files = sorted(p for p in partial.rglob("*") if p.is_file() and p.name != MANIFEST)
        entries = {}
        for file in files:
            with file.open("rb") as stream:
                os.fsync(stream.fileno())
            entries[file.relative_to(partial).as_posix()] = {
                "size": file.stat().st_size,
                "sha256": self.digests.file(file),
            }
        manifest = {"schema": SCHEMA, **manifest, "files": entries}
        write_json(partial / MANIFEST, manifest)
        folder = self.folder(manifest["stage"], manifest["fingerprint"])
        os.replace(partial, folder)
        return Artifact(folder, manifest)

    def _partial(self, stage: str, fingerprint: str) -> Path:
        return self.artifacts / f".partial-{stage}-{fingerprint[:12]}"


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(content, stream, indent=2)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
