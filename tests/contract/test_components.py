"""Every registered component passes the suite that plugin authors run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sqft_hf import HuggingFace

from sqft import Registry
from sqft.components.kinds import KINDS, Component
from sqft.errors import StageError
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.testing import check, check_exporter

ENTRIES = [entry for entry in Registry.discover().entries() if entry.provider.source.startswith("sqft ")]


READS_FILES = {"mask"}
"""Components that have no default for a file that they read: their own tests have one."""


@pytest.mark.parametrize("entry", [e for e in ENTRIES if e.component.name not in READS_FILES], ids=str)
def test_ours_keep_the_contract(entry: Any) -> None:
    check(entry.component())


NAMES = {
    "scorer": {"magnitude", "mask", "random", "sparsegpt", "wanda"},
    "allocator": {"explicit", "owl", "uniform"},
    "updater": {"least-squares"},
    "quantizer": {"gptq", "rtn"},
    "adapter": {"lora", "nls"},
    "searcher": {
        "evolutionary",
        "heuristic",
        "hill-climbing",
        "importance",
        "loss-guided",
        "maximal",
        "minimal",
        "racing",
        "random",
    },
    "merger": {"hira", "qa-sparsepeft", "sparsepeft", "unmerged"},
    "exporter": {"compressed-tensors", "gguf", "gptq", "hf", "mlx"},
}
"""The components that recipes may count on."""


def test_no_component_is_lost() -> None:
    offered = {kind: {entry.component.name for entry in ENTRIES if entry.component.kind == kind} for kind in KINDS}
    assert offered == NAMES


def test_every_folder_of_plugins_is_installed() -> None:
    folders = {folder.name for folder in (Path(__file__).parents[2] / "plugins").glob("sqft_*")}
    assert {entry.component.__module__.partition(".")[0] for entry in ENTRIES} == folders
    assert {entry.component.kind for entry in ENTRIES} == set(KINDS)


def test_every_component_that_a_plugin_defines_is_offered() -> None:
    offered = {entry.component for entry in ENTRIES}
    packages = {component.__module__.partition(".")[0] for component in offered}

    def named(base: type[Component]) -> Iterator[type[Component]]:
        for cls in base.__subclasses__():
            if "name" in vars(cls) and cls.__module__.partition(".")[0] in packages:
                yield cls
            yield from named(cls)

    assert set(named(Component)) == offered


EXPORTERS = [entry for entry in ENTRIES if entry.component.kind == "exporter"]
WITHOUT_ACT_ORDER = {"gguf", "mlx"}
"""Exporters whose format has no place for it, with tests of their own on other codes."""


@pytest.mark.parametrize("entry", EXPORTERS, ids=str)
def test_exporters_on_codes(entry: Any, quantized_folder: Path, tmp_path: Path) -> None:
    if entry.component.name in WITHOUT_ACT_ORDER:
        with pytest.raises(StageError, match="act-order"):
            check_exporter(entry.component(), FinishedModel(quantized_folder), tmp_path)
        return
    check_exporter(entry.component(), FinishedModel(quantized_folder), tmp_path)


def test_the_exporter_of_floats(model_folder: Path, tmp_path: Path) -> None:
    check_exporter(HuggingFace(dtype="bfloat16"), FinishedModel(model_folder), tmp_path)
    reader, source = FolderReader(tmp_path), FolderReader(model_folder)
    for name in source.names():
        assert torch.equal(reader.tensor(name), source.tensor(name).bfloat16())
