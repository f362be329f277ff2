"""What the headers cannot tell is found before a weight is read, with names and shapes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import ModelError, StageError
from sqft.modeling.loading.folder_reader import FolderReader


def test_a_model_of_other_layers_is_refused_before_its_weights_are_read(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    folder = tmp_path / "more"
    shutil.copytree(model_folder, folder)
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {"model.layers.0.odd.layer.weight": torch.ones(4, 32)}, weights, {"format": "pt"})
    raw["model"]["path"] = str(folder)
    raw = {key: raw[key] for key in ("schema", "name", "model", "calibration", "sparsify")}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    weights.write_bytes(weights.read_bytes()[:2000])  # the plan has read its header; nobody may want more
    with pytest.raises(StageError) as caught:
        orchestrator.run(plan)
    assert "sparsify.include: model.layers.0.odd.layer [4, 32] does not exist in LlamaForCausalLM" in str(caught.value)
    assert not list((tmp_path / "store").glob("artifacts/*"))


def test_an_architecture_transformers_does_not_know(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "llama"', '"model_type": "lama"'))
    raw["model"]["path"] = str(folder)
    orchestrator = Orchestrator(registry, tmp_path / "store")
    with pytest.raises(ModelError, match=r"cannot make a causal language model of .*odd: .*lama"):
        orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def test_a_config_that_disagrees_with_the_weights(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, model_folder: Path
) -> None:
    folder = tmp_path / "wide"
    folder.mkdir()
    for file in model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 64', '"intermediate_size": 128'))
    raw["model"]["path"] = str(folder)
    orchestrator = Orchestrator(registry, tmp_path / "store")
    with pytest.raises(StageError, match=r"gate_proj \[64, 32\] is a linear layer \[128, 32\] in LlamaForCausalLM"):
        orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


@pytest.mark.parametrize("quantized", [False, True], ids=["floats", "codes"])
def test_a_tokenizer_larger_than_the_vocabulary(
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    model_folder: Path,
    quantized_folder: Path,
    quantized: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "few"
    shutil.copytree(quantized_folder if quantized else model_folder, folder)
    whole = load_file(folder / "model.safetensors")
    for name in {"model.embed_tokens.weight", "lm_head.weight"} & whole.keys():
        whole[name] = whole[name][:200].clone()
    save_file(whole, folder / "model.safetensors", {"format": "pt"})
    config = folder / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"vocab_size": 200}))
    raw["model"]["path"] = str(folder)
    if quantized:
        del raw["sparsify"], raw["evaluate"]
        raw["finetune"]["merger"] = "qa-sparsepeft"
    monkeypatch.setattr(FolderReader, "tensor", None)  # no weight is read
    monkeypatch.setattr("sqft.modeling.loading.load_floats", None)
    orchestrator = Orchestrator(registry, tmp_path / "store")
    with pytest.raises(ModelError, match="few: the tokenizer has 257 tokens, and the model has rows for 200"):
        orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["dt_proj"], "does not call backbone.layers.0.mixer.dt_proj, and PEFT, for which 'unmerged' writes"),
        (["out_proj"], "PEFT, for which 'unmerged' writes its adapter, refuses them: .*incompatible with Mamba"),
    ],
)
def test_an_adapter_that_stock_peft_would_not_apply(
    targets: list[str], message: str, raw: dict[str, Any], registry: Registry, tmp_path: Path, tokenizer: Any
) -> None:
    config = MambaConfig(vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, state_size=8)
    MambaForCausalLM(config).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    raw = {key: raw[key] for key in ("schema", "name", "finetune")} | {"model": {"path": str(tmp_path / "mamba")}}
    raw["finetune"] |= {"merger": "unmerged", "targets": targets}
    orchestrator = Orchestrator(registry, tmp_path / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    with pytest.raises(StageError, match=message):
        orchestrator.run(plan)
