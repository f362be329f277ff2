"""What other programs make of the checkpoints of the real model, each in an environment without sqft.

`make consumers` makes the environments; one that is missing is a failure here.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5TextConfig

from sqft import Orchestrator, Registry, Run
from sqft.checkpoints.model_spec import ModelSpec
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import unpack_mask
from sqft.modeling.loading import load_model
from sqft.modeling.loading.quantized import read_quantized
from tests.support.elsewhere import ROOT, elsewhere
from tests.support.models_for_others import quantized_folder, save_random

pytestmark = pytest.mark.slow
RECIPE = ROOT / "examples" / "recipes" / "qa-sparsepeft.json"
FEW_STEPS = [
    "sparsify.updater=least-squares",
    "finetune.steps=4",
    "finetune.warmup_steps=0",
    "evaluate.exact_match=null",
    'evaluate.of=["search","merge"]',
]


@pytest.fixture(scope="module")
def run() -> Run:
    """QA-SparsePEFT of a few steps, on the sparse base that `make quickstart` left in ./store."""
    orchestrator = Orchestrator(Registry.discover(), ROOT / "store")
    return orchestrator.run(orchestrator.load(RECIPE, FEW_STEPS))


def test_the_real_model_merges_into_codes(run: Run) -> None:
    rows = {row["configuration"].partition(" ")[0]: row for row in run.report["rows"]}
    assert rows["search"]["perplexity"] == rows["merge"]["perplexity"]
    report = run["merge"].report
    assert report["codes_changed"] > 0 and report["logits_difference"] < 1e-3
    masks = load_file(run["sparsify"].folder / "masks.safetensors")
    for layer, quantized in read_quantized(run["merge"].folder / "model").items():
        value = dequantize(quantized)
        assert not value[~unpack_mask(masks[layer], (value.shape[0], value.shape[1]))].any(), layer


def opened(consumer: str, folder: Path, scratch: Path, same: Path | None = None) -> str:
    """What a consumer says of a folder, held against what sqft reads there, or in `same`."""
    model, tokenizer = load_model(ModelSpec(same or folder))
    ids = tokenizer("A box has 15 stamps. Ben takes 12. Left: 3. The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits.contiguous()}, scratch / "given.safetensors")
    script = ROOT / "tests" / "consumers" / consumer / "check.py"
    return elsewhere(consumer, script, folder, scratch / "given.safetensors")


@pytest.mark.parametrize("consumer", ["gptqmodel", "auto_gptq"])
def test_the_merged_checkpoint_elsewhere(run: Run, consumer: str, tmp_path: Path) -> None:
    assert "largest difference" in opened(consumer, run["merge"].folder / "model", tmp_path)


def test_the_merged_model_as_compressed_tensors(run: Run, tmp_path: Path) -> None:
    from sqft_compressed_tensors import CompressedTensors

    from sqft.modeling.loading.finished_model import FinishedModel

    folder = tmp_path / "exported"
    folder.mkdir()
    CompressedTensors().export(FinishedModel(run["merge"].folder / "model"), folder)
    given = run["merge"].folder / "model"
    assert "largest difference" in opened("compressed_tensors", folder, tmp_path, given)


@pytest.mark.parametrize("consumer", ["gptqmodel", "auto_gptq"])
@pytest.mark.parametrize(
    "options",
    [{"symmetric": False}, {"bits": 8, "group_size": 32}, {"name": "gptq", "act_order": True}],
    ids=["asymmetric", "8 bit", "act-order"],
)
def test_other_grids_elsewhere(options: dict[str, Any], consumer: str, tmp_path: Path) -> None:
    options = {"group_size": 64} | options
    name = options.pop("name", "rtn")
    raw = {
        "name": "grids",
        "model": {"path": str(ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf")},
        "calibration": {"data": str(ROOT / "examples/quickstart/data/calibration.jsonl"), "samples": 2, "length": 128},
        "quantize": {"quantizer": {"name": name, "options": options}},
    }
    assert "largest difference" in opened(consumer, quantized_folder(raw, ROOT / "store"), tmp_path)


def test_linear_attention_with_narrow_inputs_in_floats_elsewhere(tokenizer: Any, data: Path, tmp_path: Path) -> None:
    """A reader must not expect codes of what was left out (`in_proj_a` and `in_proj_b` of Qwen3.5)."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    heads = {"num_key_value_heads": 2, "head_dim": 32, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
    linear = {"linear_key_head_dim": 32, "linear_value_head_dim": 32}
    kinds = {"layer_types": ["linear_attention", "full_attention"], "bos_token_id": 1, "eos_token_id": 1}
    config = Qwen3_5TextConfig(vocab_size=len(tokenizer), pad_token_id=1, **sizes, **heads, **linear, **kinds)
    raw = {
        "name": "narrow",
        "model": {"path": str(save_random(config, tokenizer, tmp_path / "model"))},
        "calibration": {"data": str(data / "calibration.jsonl"), "samples": 4, "length": 32},
        "quantize": {"quantizer": {"name": "gptq", "options": {"group_size": 32}}},
    }
    folder = quantized_folder(raw, tmp_path / "store")
    assert "model.layers.0.linear_attn.in_proj_a" not in read_quantized(folder)
    assert "largest difference" in opened("gptqmodel", folder, tmp_path)


def test_the_bridge_to_gptqmodel_keeps_the_contract() -> None:
    """And agrees with our own GPTQ code by code, where one grid a row leaves no choice of when to fit it."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", ROOT / "plugins" / "sqft-gptqmodel")))
    printed = elsewhere("gptqmodel", ROOT / "tests" / "consumers" / "gptqmodel" / "bridge.py", PYTHONPATH=paths)
    # A tie that is rounded the other way moves what follows in its row.
    assert float(printed.split()[-1]) > 0.98
