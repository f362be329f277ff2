"""The model that a step compresses, part by part. A finished part is on disk, and a killed run goes on after it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.safetensors import join
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.modeling.loading.part_writer import PartWriter
from sqft.modeling.loading.parts import PartedModel, WholeModel, open_in_parts
from sqft.stages.inputs import StageInputs
from sqft.utils.files import CHECKPOINTS, MANIFEST, write_json, written_whole

Beside = Mapping[str, Mapping[str, Tensor]]
"""What a part has beside its weights: a file's name without suffix -> its tensors by layer."""


Restore = Callable[[WholeModel, str, FolderReader], None]
"""Brings a part that is held to what was written of it, which is read from its file."""


def reload_floats(opened: WholeModel, part: str, written: FolderReader) -> None:
    """Bring a part to the floats that were written of it."""
    assert isinstance(opened, PartedModel)
    opened.load(part, written)


class StepParts:
    """The parts of a step's model: read one at a time where the step is streamed, and otherwise all there.

    Args:
        inputs: the stage's inputs. In its scratch folder may be finished parts of an earlier attempt.
        source: the model that is compressed.
        restore: is called with each finished part when it is needed again.
    """

    def __init__(self, inputs: StageInputs, source: ModelSpec, restore: Restore) -> None:
        self.streamed, self.scratch, self._restore = inputs.step.streamed, inputs.scratch, restore
        self._digests = inputs.digests
        # What a part is made of: a step before may have been made again since, and not come out the same.
        files = {role: folder / MANIFEST for role, folder in inputs.folders.items()}
        self._made_of = {role: self._digests.file(file) for role, file in files.items() if file.is_file()}
        self.opened, self.tokenizer = open_in_parts(source, self.streamed)
        self.writer = PartWriter(self.scratch / "model", self.opened.parts)
        self.records: dict[str, dict[str, Any]] = {}
        """What is known of each finished part, in order."""
        self._beside: dict[str, dict[str, Tensor]] = {}
        for part in self.opened.parts if self.streamed else ():
            if (record := self._sealed(part)) is None:
                break
            self.records[part] = record

    @contextmanager
    def held(self, part: str, begin: Callable[[str], None], end: Callable[[str], None]) -> Iterator[None]:
        """Have a part in memory. One that is not finished as yet begins and ends with these calls."""
        with self.opened.held(part):
            if part in self.records:
                self._restore(self.opened, part, self.writer.reader(part))
                yield
            else:
                begin(part)
                yield
                end(part)

    @contextmanager
    def seen(self, part: str) -> Iterator[None]:
        """Have a part in memory, as `held`, where another process finishes it."""
        with self.held(part, lambda _: None, lambda _: None):
            yield

    def seal(
        self, part: str, record: dict[str, Any], weights: Callable[[], Mapping[str, Tensor]], beside: Beside
    ) -> None:
        """Finish a part.

        Args:
            part: is held.
            record: what is to be known of it.
            weights: returns its tensors, by the names of the checkpoint; called where they are written now.
            beside: what else is written.
        """
        if self.streamed:
            self.writer.write(part, weights())
            self._file(part, "json").parent.mkdir(parents=True, exist_ok=True)
            files = [self.writer.files[part], *(self._file(part, f"{name}.safetensors") for name in beside)]
            for tensors, file in zip(beside.values(), files[1:], strict=True):
                with written_whole(file) as temporary:
                    save_file(dict(tensors), temporary)
            digests = {file.relative_to(self.scratch).as_posix(): self._digests.file(file) for file in files}
            sealed = {"record": record, "files": digests, "made_of": self._made_of}
            write_json(self._file(part, "json"), {**sealed, "checksum": _checksum(sealed)})  # last: it seals the part
        else:
            for name, tensors in beside.items():
                self._beside.setdefault(name, {}).update(tensors)
        self.records[part] = record

    def write_beside(self, names: list[str]) -> None:
        """Write the files beside the model, `NAME.safetensors`, of all parts together."""
        for name in names:
            file = self.scratch / f"{name}.safetensors"
            if self.streamed:
                parts = (self._file(part, file.name) for part in self.opened.parts)
                join([part for part in parts if part.is_file()], file)
            else:
                save_file(self._beside.get(name, {}), file)

    def all(self, key: str) -> dict[str, Any]:
        """Return an entry of the records that is by layer or tensor, of all parts together."""
        return {name: value for record in self.records.values() for name, value in record.get(key, {}).items()}

    def _sealed(self, part: str) -> dict[str, Any] | None:
        """Return the record of a finished part; None where there is none, or anything of it is not as it was sealed."""
        try:
            sealed = json.loads(self._file(part, "json").read_text("utf-8"))
            checksum, files = sealed.pop("checksum"), sealed["files"]
            intact = checksum == _checksum(sealed) and sealed["made_of"] == self._made_of
            intact = intact and all(self._digests.file(self.scratch / name) == known for name, known in files.items())
            return dict(sealed["record"]) if intact else None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None

    def _file(self, part: str, name: str) -> Path:
        return self.scratch / CHECKPOINTS / "parts" / f"{self.opened.parts.index(part):05d}.{name}"


def _checksum(sealed: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sealed, sort_keys=True).encode()).hexdigest()
