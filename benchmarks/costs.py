"""Measure what each option costs in time: one table for one machine, of seconds and of ratios to the paper's choice.

    python benchmarks/costs.py [--turns 2] [--samples 32] [--steps 10] [--calibration general.jsonl] [--store DIR]

SmolLM2-135M-Instruct as in `examples/recipes`: sparsify and quantize by their options (seconds of the whole step, its
reading of the model included), and a step of training by merger, base and teacher (the median, of batches of 16). The
options take turns: a turn is one seed, and measures all of them. Ratios are of the same turn, to the first row of the
stage. Run it on a machine that does nothing else. Finished steps stay in the store, so that a stopped run goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers

from sqft import Orchestrator, Recipe, Registry

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
GPTQ = "quantize.quantizer.options"
LEAST_SQUARES = ["sparsify.updater=least-squares"]
REFINED = [f"{GPTQ}.refine=3", f"{GPTQ}.refine_damp=0.5", f"{GPTQ}.target=dense"]
OPTIONS: dict[str, dict[str, list[str]]] = {
    "sparsify": {
        "wanda": [],
        "magnitude": ["sparsify.scorer=magnitude"],
        "sparsegpt": ["sparsify.scorer=sparsegpt"],
        "wanda, updater least-squares": LEAST_SQUARES,
    },
    "quantize": {
        "gptq": [],
        "gptq, clip": [f"{GPTQ}.clip=true"],
        "gptq, asymmetric": [f"{GPTQ}.symmetric=false"],
        "gptq, act_order": [f"{GPTQ}.act_order=true"],
        "gptq, refined": REFINED,
        "gptq, asymmetric, refined": [f"{GPTQ}.symmetric=false", *REFINED],
    },
    "finetune": {
        "sparsepeft": ["finetune.merger=sparsepeft"],
        "unmerged": ["finetune.merger=unmerged"],
        "hira": ["finetune.merger=hira"],
        "sparsepeft, root scaling": ["finetune.merger=sparsepeft", "finetune.adapter.options.scaling=root"],
        "sparsepeft, LoRA+": ["finetune.merger=sparsepeft", "finetune.learning_rate_ratio=16"],
        "sparsepeft, dense teacher": ["finetune.merger=sparsepeft", "finetune.teacher=dense"],
        "qa-sparsepeft from floats": ["finetune.merger=qa-sparsepeft", "finetune.base=floats"],
        "qa-sparsepeft from compensated": ["finetune.merger=qa-sparsepeft", "finetune.base=compensated"],
        "qa-sparsepeft from codes": ["finetune.merger=qa-sparsepeft", "finetune.base=codes"],
        "hira on codes": ["finetune.merger=hira", "finetune.base=codes"],
    },
}


def recipe_of(stage: str, changes: list[str], arguments: argparse.Namespace, seed: int) -> Recipe:
    """Return a recipe that ends with the stage."""
    words = [*changes, f"seed={seed}", f"calibration.samples={arguments.samples}", "merge=null", "evaluate=null"]
    words.append(f"finetune.steps={arguments.steps}" if stage == "finetune" else "finetune=null")
    on_floats = stage == "finetune" and not any("qa-sparsepeft" in word or "base=codes" in word for word in changes)
    if stage == "sparsify" or on_floats:
        words.append("quantize=null")
    if arguments.calibration:
        words.append(f"calibration.data={json.dumps(str(arguments.calibration.absolute()))}")
    return Recipe.load(RECIPES / "qa-sparsepeft.json", words)


def measure(orchestrator: Orchestrator, stage: str, recipe: Recipe) -> dict[str, float]:
    """Return the seconds of the stage without its check, and of a step of training where it trains."""
    step = orchestrator.run(orchestrator.plan(recipe))[stage]
    return {"stage": step.artifact.manifest["seconds"], "step": step.report.get("step_seconds") or 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=2, help="turn k measures all options with seed k")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows of 512 tokens")
    parser.add_argument("--steps", type=int, default=10, help="steps of training")
    parser.add_argument("--calibration", type=Path, help="records of text; by default the quickstart's")
    parser.add_argument("--stages", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    parser.add_argument("--store", type=Path, default=Path("store-costs"))
    arguments = parser.parse_args()
    orchestrator = Orchestrator(Registry.discover(), arguments.store)
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for turn in range(arguments.turns):
        for stage in arguments.stages:
            for name, changes in OPTIONS[stage].items():
                recipe = recipe_of(stage, changes, arguments, turn)
                found.setdefault(stage, {}).setdefault(name, []).append(measure(orchestrator, stage, recipe))
                print(f"turn {turn}, {stage}, {name}: {found[stage][name][-1]}", flush=True)
    for stage, rows in found.items():
        key = "step" if stage == "finetune" else "stage"
        first = [one[key] for one in next(iter(rows.values()))]
        unit = "a step" if stage == "finetune" else "seconds"
        print(f"\n| {stage} | {unit} | ratio to the first row, by turn |\n|---|---|---|")
        for name, turns in rows.items():
            ratios = [f"{one[key] / base:.2f}" for one, base in zip(turns, first, strict=True)]
            print(f"| {name} | {statistics.median(one[key] for one in turns):.1f} s | {', '.join(ratios)} |")
    machine: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    versions = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    print(f"\n{json.dumps(machine | versions | {'found': found})}")


if __name__ == "__main__":
    main()
