"""What other programs make of the checkpoints of the real model, each in an environment without sqft.

`make consumers` makes the environments; one that is missing is a failure here.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sqft import Orchestrator, Registry, Run
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import unpack_mask
from sqft.modeling.checkpoint import open_folder, read_quantized

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "qa-sparsepeft.json"
FEW_STEPS = [
    "finetune.steps=4",
    "finetune.warmup_steps=0",
    "evaluate.exact_match=null",
    'evaluate.of=["search","merge"]',
]


@pytest.fixture(scope="module")
def run() -> Run:
    """QA-SparsePEFT of a few steps, on the sparse base that `make quickstart` left in ./store, if it is there."""
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


@pytest.mark.parametrize("consumer", ["gptqmodel"])
def test_the_merged_checkpoint_elsewhere(run: Run, consumer: str, tmp_path: Path) -> None:
    folder = run["merge"].folder / "model"
    model, tokenizer = open_folder(folder)
    ids = tokenizer("A box has 15 stamps. Ben takes 12. Left: 3. The quick brown fox", return_tensors="pt").input_ids
    with torch.no_grad():
        save_file({"ids": ids, "logits": model(ids).logits}, tmp_path / "given.safetensors")
    python = ROOT / ".consumers" / consumer / "bin" / "python"
    assert python.exists(), "run `make consumers` first"
    script = ROOT / "tests" / "consumers" / consumer / "check.py"
    command = [str(python), "-P", str(script), str(folder), str(tmp_path / "given.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
