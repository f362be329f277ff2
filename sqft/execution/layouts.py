"""What is known of models' modules, kept in the store: only the first plan of a model imports torch."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from sqft.checkpoints.layout import ModelLayout
from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.model_spec import ModelSpec
from sqft.utils.code_digest import package_digest
from sqft.utils.files import write_text

_known: dict[str, ModelLayout] = {}
"""Those that this process has seen, by key."""


class Layouts:
    """The layouts of models, remembered in a folder if that can be written, or made in the one above."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, spec: ModelSpec, source: ModelSource) -> ModelLayout:
        """Return the layout of a model, made of its modules the first time.

        Raises:
            ModelError: when transformers cannot make a model of its config, or it has no decoder blocks.
        """
        key = layout_key(spec, source)
        file = self._folder / f"{key}.json"
        if key not in _known:
            _known[key] = _stored(file) or _made(spec, source)
        with suppress(OSError):  # there is no store yet, or it may not be written
            if not file.is_file():
                self._folder.mkdir(exist_ok=True)
                write_text(file, _known[key].to_json())
        return _known[key]


def _stored(file: Path) -> ModelLayout | None:
    try:
        return ModelLayout.from_json(file.read_text("utf-8"))
    except (OSError, ValueError):  # not made yet, or damaged
        return None


def _made(spec: ModelSpec, source: ModelSource) -> ModelLayout:
    from sqft.modeling.architecture.layout import describe

    return describe(spec, source)


def layout_key(spec: ModelSpec, source: ModelSource) -> str:
    """Return a digest of all that a layout depends on: the model, how it is loaded, and the code that describes it."""
    how = {key: value for key, value in dataclasses.asdict(spec).items() if key not in ("path", "dtype")}
    code = [package_digest("sqft"), version("transformers"), version("torch")]
    return hashlib.sha256(json.dumps([source.digest, how, code], sort_keys=True).encode()).hexdigest()
