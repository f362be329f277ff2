"""Model folders to spoil, and how tests find models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from sqft.checkpoints.model_source import ModelSource
from sqft.checkpoints.source import find_model
from sqft.errors import SqftError
from sqft.utils.digests import Digests


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


@pytest.fixture
def sharded(model: LlamaForCausalLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    return tmp_path / "sharded"


@pytest.fixture(scope="session")
def find() -> Callable[..., ModelSource]:
    """Finds the model of a path, as a recipe would name it."""

    def find(path: Path | str) -> ModelSource:
        return find_model(str(path), Path, None, Digests())

    return find


@pytest.fixture(scope="session")
def assert_rejected(find: Callable[..., ModelSource]) -> Callable[..., None]:
    """Asserts that no model is found at a path, with a message of these words."""

    def assert_rejected(path: Path | str, *words: str) -> None:
        with pytest.raises(SqftError) as caught:
            find(path)
        for word in words:
            assert word in str(caught.value)

    return assert_rejected
