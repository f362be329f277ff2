"""Measure what codes lose: perplexity of the sparse model after gptq, by its options and bits, on several texts.

    python benchmarks/codes.py [--store store-codes] [--bits 4 3 2] [--ways gptq clip …] [--seed 0]
        [--calibration general.jsonl --samples 32] [--texts prose.txt manuals.txt]

SmolLM2 with half of its weights at zero by wanda, groups of 64. Recipes differ only in the options of gptq. What
fits the calibration text is flattered by text of the same kind, so give texts of other kinds.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
WAYS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "asymmetric": {"symmetric": False},
    "clip": {"clip": True},
    "act_order": {"act_order": True},
    **{
        f"refine {passes}, damp {damp}, {target}": {"refine": passes, "refine_damp": damp, "target": target}
        for target in ("sparse", "dense")
        for passes in (1, 3, 5)
        for damp in (0.0, 0.1, 0.5, 1.0)
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("store-codes"))
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4, 8), default=[4, 3, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calibration", type=Path, help="records of text; by default the quickstart's")
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens")
    parser.add_argument("--texts", nargs="+", type=Path, help="texts to measure on; by default the quickstart's")
    arguments = parser.parse_args()
    raw = json.loads((RECIPES / "sparsepeft.json").read_text("utf-8"))
    perplexity = raw["evaluate"]["perplexity"]
    texts = [str(text.absolute()) for text in arguments.texts or ()] or [perplexity["text"]]
    kept = {key: raw[key] for key in ("schema", "model", "calibration", "sparsify")} | {"seed": arguments.seed}
    kept["calibration"]["samples"] = arguments.samples
    if arguments.calibration:
        kept["calibration"]["data"] = str(arguments.calibration.absolute())
    orchestrator = Orchestrator(Registry.discover(), arguments.store)

    def rows(text: str, step: str, **sections: Any) -> dict[str, Any]:
        """Measure a step's model on one text; every step but this measurement is in the store after the first."""
        evaluate = {"of": [step], "perplexity": {**perplexity, "text": text}}
        recipe = Recipe.parse({**kept, **sections, "name": "codes", "evaluate": evaluate}, folder=RECIPES)
        row: dict[str, Any] = orchestrator.run(orchestrator.plan(recipe)).report["rows"][0]
        return row

    print(f"| bits | way | {' | '.join(Path(text).stem for text in texts)} | made in |")
    print("|---" * (3 + len(texts)) + "|")

    def line(bits: str, way: str, measured: list[dict[str, Any]]) -> None:
        figures = " | ".join(f"{row['perplexity']:.2f}" for row in measured)
        print(f"| {bits} | {way} | {figures} | {measured[0]['seconds']:.0f} s |", flush=True)

    line("–", "sparse floats", [rows(text, "sparsify") for text in texts])
    for bits in arguments.bits:
        for way in arguments.ways:
            quantizer = {"name": "gptq", "options": {"bits": bits, "group_size": 64, **WAYS[way]}}
            line(str(bits), way, [rows(text, "quantize", quantize={"quantizer": quantizer}) for text in texts])


if __name__ == "__main__":
    main()
