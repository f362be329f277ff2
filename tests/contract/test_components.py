"""Every registered component passes the suite that plugin authors run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sqft_hf import HuggingFace

from sqft import Registry
from sqft.components.kinds import KINDS
from sqft.modeling.loading.finished_model import FinishedModel
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.testing import check, check_exporter

ENTRIES = [entry for entry in Registry.discover().entries() if entry.provider.source.startswith("sqft ")]


@pytest.mark.parametrize("entry", ENTRIES, ids=str)
def test_ours_keep_the_contract(entry: Any) -> None:
    check(entry.component())


def test_nothing_is_missing() -> None:
    assert {entry.component.kind for entry in ENTRIES} == set(KINDS)
    assert len(ENTRIES) == 22


EXPORTERS = [entry for entry in ENTRIES if entry.component.kind == "exporter"]


@pytest.mark.parametrize("entry", EXPORTERS, ids=str)
def test_exporters_on_codes(entry: Any, quantized_folder: Path, tmp_path: Path) -> None:
    check_exporter(entry.component(), FinishedModel(quantized_folder), tmp_path)


def test_the_exporter_of_floats(model_folder: Path, tmp_path: Path) -> None:
    check_exporter(HuggingFace(dtype="bfloat16"), FinishedModel(model_folder), tmp_path)
    reader, source = FolderReader(tmp_path), FolderReader(model_folder)
    for name in source.names():
        assert torch.equal(reader.tensor(name), source.tensor(name).bfloat16())
