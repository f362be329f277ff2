"""A LoRA adapter on the model that is measured, against stock peft; and what peft would let pass with a warning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sqft.checkpoints.model_spec import ModelSpec
from sqft.errors import ModelError
from sqft.modeling.evaluation.peft_adapter import attach_peft_adapter
from sqft.modeling.loading import load_model


def saved(model: LlamaForCausalLM, folder: Path, **settings: Any) -> Path:
    """Save an adapter whose factors are all random."""
    settings = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False} | settings
    get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings)).save_pretrained(str(folder))
    return folder


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", {}),
        ("bfloat16", {"use_rslora": True, "rank_pattern": {"q_proj": 2}}),
        ("float32", {"use_dora": True}),
        ("float32", {"modules_to_save": ["lm_head"]}),
    ],
)
def test_logits_are_those_of_stock_peft(
    model_folder: Path, model: LlamaForCausalLM, tmp_path: Path, dtype: str, settings: dict[str, Any]
) -> None:
    adapter = saved(model, tmp_path / "adapter", **settings)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=getattr(torch, dtype))
    stock = PeftModel.from_pretrained(base, adapter)
    measured, _ = load_model(ModelSpec(model_folder, dtype))
    tokens = torch.arange(2, 40)[None]
    with torch.no_grad():
        before = measured(tokens).logits
        count = attach_peft_adapter(measured, adapter)
        expected, found = stock(tokens).logits, measured(tokens).logits
    assert torch.equal(found, expected) and not torch.equal(found, before)
    assert count == sum(tensor.numel() for tensor in load_file(adapter / "adapter_model.safetensors").values())
    assert not measured.training


def test_an_adapter_of_another_model(model_folder: Path, model: LlamaForCausalLM, tmp_path: Path) -> None:
    adapter = saved(model, tmp_path / "adapter")
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    elsewhere = name.replace("layers.0", "layers.9")

    def refused(tensors: dict[str, torch.Tensor], words: str) -> None:
        save_file(tensors, file)
        with pytest.raises(ModelError, match=words):
            attach_peft_adapter(load_model(ModelSpec(model_folder))[0], adapter)

    refused({key: value for key, value in tensors.items() if key != name}, "the adapter has no .*layers.0")
    refused(tensors | {elsewhere: tensors[name].clone()}, "the model has no place for .*layers.9")
    refused(tensors | {name: torch.zeros(4, 7)}, "peft cannot put .*size mismatch")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["query"]}))
    refused(tensors, "peft cannot put .*query")
