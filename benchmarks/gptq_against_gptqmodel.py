"""Perplexity of our gptq and of gptqmodel's, at sparsity 0: same model, grid, damping, order and calibration.

    python benchmarks/gptq_against_gptqmodel.py [--python .consumers/gptqmodel/bin/python] [--store DIR]

gptqmodel runs in its own environment (`make consumers`). sqft reads and measures both checkpoints, gptqmodel's like any
model that was quantized elsewhere. Needs the model and data of `make quickstart`.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.modeling.loading import load_model
from sqft.modeling.loading.transformers_io import save_model
from sqft.planning.plan import Plan

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT / "examples" / "quickstart" / "data"
BITS, GROUP_SIZE, DAMP, SAMPLES, LENGTH = 4, 64, 0.01, 16, 512


def recipe(name: str, model: Path, **sections: Any) -> Recipe:
    text = {"text": str(DATA / "heldout.txt"), "tokens": 8192, "length": 1024}
    evaluate = {"of": ["quantize" if "quantize" in sections else "model"], "perplexity": text}
    return Recipe.parse({"name": name, "model": {"path": str(model)}, **sections, "evaluate": evaluate})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, default=ROOT / ".consumers" / "gptqmodel" / "bin" / "python")
    parser.add_argument("--store", type=Path, default=Path("store-gptq"))
    arguments = parser.parse_args()
    orchestrator = Orchestrator(Registry.discover(), arguments.store)

    def perplexity(wanted: Recipe) -> float:
        return float(orchestrator.run(orchestrator.plan(wanted)).report["rows"][0]["perplexity"])

    calibration = {"data": str(DATA / "calibration.jsonl"), "samples": SAMPLES, "length": LENGTH}
    dense = recipe("dense", MODEL)
    print("| inputs | sqft | gptqmodel | ratio |\n|---|---|---|---|")
    print(f"| (not quantized) | {perplexity(dense):.3f} | | |", flush=True)
    plan = orchestrator.plan(dense)
    model, tokenizer = load_model(plan.model_spec)
    floats = arguments.store / "floats"
    if not floats.is_dir():
        save_model(model, tokenizer, floats)
    windows = arguments.store / "windows.safetensors"
    for act_order, reorder in ((False, False), (False, True), (True, False)):
        options = {"bits": BITS, "group_size": GROUP_SIZE, "damp": DAMP}
        options |= {"act_order": act_order, "reorder_groups": reorder}
        quantize = {"quantizer": {"name": "gptq", "options": options}}
        ours = recipe("ours", MODEL, calibration=calibration, quantize=quantize)
        found = perplexity(ours)
        out = arguments.store / f"theirs-{int(act_order)}{int(reorder)}"
        if not out.is_dir():
            save_file({"windows": _windows(orchestrator.plan(ours), tokenizer)}, windows)
            script = Path(__file__).with_name("quantize_with_gptqmodel.py")
            words = [floats, windows, out, BITS, GROUP_SIZE, DAMP, int(act_order)]
            command = [str(arguments.python), "-P", str(script), *map(str, words), str(int(reorder))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"gptqmodel failed:\n{done.stderr[-2000:]}")
        theirs = perplexity(recipe("theirs", out))
        order = "act-order" if act_order else "groups reordered" if reorder else "as they stand"
        print(f"| {order} | {found:.3f} | {theirs:.3f} | {found / theirs:.4f} |", flush=True)


def _windows(plan: Plan, tokenizer: Any) -> Tensor:
    """The calibration windows that our quantize step saw."""
    from sqft.stages.inputs import StepData

    return StepData(plan, plan.step("quantize")).calibration(tokenizer)


if __name__ == "__main__":
    main()
