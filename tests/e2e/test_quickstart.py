"""The proof on the real model: the quickstart's promises, checked on what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.kernels.masks import unpack_mask

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "quickstart.json"
PROMPT = "Helen has 12 cards and buys 9 more. Total:"


@pytest.fixture(scope="module")
def run() -> Run:
    """The run that `make quickstart` left in ./store, or a new one. A missing model fails: the Makefile fetches it."""
    orchestrator = Orchestrator(Registry.discover(), ROOT / "store")
    return orchestrator.run(orchestrator.plan(Recipe.load(RECIPE)))


def test_the_table(run: Run) -> None:
    rows = {row["configuration"]: row for row in run.report["rows"]}
    assert list(rows) == [
        "model", "sparsify", "finetune:maximal", "finetune:heuristic", "search (hill-climbing)", "merge",
    ]  # fmt: skip
    assert run["evaluate:merge"].report["exact_match"]["samples"] >= 200
    assert rows["sparsify"]["accuracy"] <= 0.05
    assert rows["finetune:heuristic"]["accuracy"] >= 0.35
    merged, tuned = (
        [json.loads(line)["right"] for line in (run[f"evaluate:{n}"].folder / "predictions.jsonl").open()]
        for n in ("merge", "search")
    )
    assert merged == tuned
    assert rows["merge"]["sparsity"] >= rows["sparsify"]["sparsity"] >= 0.4999
    assert max(row["peak_memory"] or 0 for row in rows.values()) < 6 * 2**30


def test_every_zero_is_kept_and_every_layer_changed(run: Run) -> None:
    masks = load_file(run["sparsify"].folder / "masks.safetensors")
    base = load_file(run["sparsify"].folder / "model" / "model.safetensors")
    merged = load_file(run["merge"].folder / "model" / "model.safetensors")
    assert len(masks) == 210
    changed = 0
    for layer, packed in masks.items():
        before, after = base[f"{layer}.weight"], merged[f"{layer}.weight"]
        mask = unpack_mask(packed, (before.shape[0], before.shape[1]))
        assert not after[~mask].any(), layer
        assert int((after == 0).sum()) >= int((~mask).sum())
        changed += not torch.equal(before, after)
    assert changed == 30 * 5
    rest = base.keys() - {f"{layer}.weight" for layer in masks}
    assert all(torch.equal(base[name], merged[name]) for name in rest)


def test_logits_without_sqft_equal_the_two_path_oracle(run: Run, tmp_path: Path) -> None:
    """W x + scale (W ⊙ (BA)) x, written here, against the merged model in a process that has no sqft."""
    out = tmp_path / "logits.pt"
    code = (
        "import sys; sys.modules['sqft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t = AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "m = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype='auto')\n"
        "ids = t(sys.argv[3], return_tensors='pt').input_ids\n"
        "with torch.no_grad(): torch.save({'ids': ids, 'logits': m(ids).logits}, sys.argv[2])\n"
        "assert t.apply_chat_template([{'role': 'user', 'content': 'hi'}], tokenize=False)"
    )
    command = [sys.executable, "-c", code, str(run["merge"].folder / "model"), str(out), PROMPT]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run["sparsify"].folder / "model", dtype=torch.float32)
    adapter = load_file(run["search"].folder / "adapter" / "adapter.safetensors")
    scales = json.loads((run["search"].folder / "adapter" / "sqft_adapter.json").read_text())["scales"]
    for name, linear in model.named_modules():
        if f"{name}.lora_A" in adapter:
            low = scales[name] * (adapter[f"{name}.lora_B"] @ adapter[f"{name}.lora_A"]) * linear.weight
            linear.register_forward_hook(lambda _, args, y, low=low: y + args[0] @ low.T)
    found = torch.load(out)
    with torch.no_grad():
        expected = model(found["ids"]).logits
    assert (found["logits"] - expected).abs().max() <= 1e-4


def test_wandas_masks_on_the_first_block(run: Run) -> None:
    """Against float64 brute force; see tests/modeling/calibration/test_walk.py for the loop.

    Only q, k and v see inputs that no update of an earlier layer has changed.
    """
    import importlib.util

    place = ROOT / "tests" / "modeling" / "calibration" / "test_walk.py"
    spec = importlib.util.spec_from_file_location("oracle", place)
    assert spec and spec.loader
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    oracle.check_wanda(run["sparsify"].folder, run.plan.source.path, run, ("q_proj", "k_proj", "v_proj"))
