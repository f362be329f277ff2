"""The model that the contract suite gives to exporters."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sqft.kernels.grids import dequantize
from sqft.modeling.tiny_model import tiny_model
from sqft.utils.digests import Digests


@pytest.mark.parametrize("codes", [False, True])
def test_it_is_always_the_same_and_half_zero(codes: bool, tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "one", codes)
    tiny_model(tmp_path / "other", codes)
    assert Digests().path(tmp_path / "one") == Digests().path(tmp_path / "other")
    assert len(model.quantized()) == (14 if codes else 0)
    name = "model.layers.1.mlp.up_proj"
    weight = model.tensor(f"{name}.weight")
    assert 0.5 <= float((weight == 0).float().mean()) < 0.6 and weight.shape == (96, 64)
    if codes:
        assert dequantize(model.codes(name)).equal(weight) and model.codes(name).grid.group_size == 32
    text = "The 15th, then: äß"
    tokenizer = AutoTokenizer.from_pretrained(model.folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.convert_tokens_to_ids("the") in ids
