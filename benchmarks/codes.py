"""Measure what codes lose: perplexity of the sparse model after gptq, by its options and bits, on several texts.

    python benchmarks/codes.py [--store store-codes] [--bits 4 3 2] [--ways gptq clip …] [--seeds 0 1 2]
        [--dense | --updater least-squares] [--calibration general.jsonl --samples 32] [--texts prose.txt manuals.txt]

SmolLM2 with half of its weights at zero by wanda (with --dense, none), groups of 64. Recipes differ only in the options
of gptq. A seed decides which windows of the calibration text are drawn. What fits the calibration text is flattered by
text of the same kind, so give texts of other kinds. The store keeps finished steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
WAYS: dict[str, dict[str, Any]] = {
    "gptq": {},
    "asymmetric": {"symmetric": False},
    "clip": {"clip": True},
    "act_order": {"act_order": True},
    "clip, asymmetric": {"clip": True, "symmetric": False},
    **{
        f"refine {passes}, damp {damp}, {target}": {"refine": passes, "refine_damp": damp, "target": target}
        for target in ("sparse", "dense")
        for passes in (1, 3, 5)
        for damp in (0.0, 0.1, 0.5, 1.0)
    },
}
REFINED = {"refine": 3, "refine_damp": 0.5, "target": "dense"}
WAYS |= {
    f"{way} + refined": {**WAYS[way], **REFINED} for way in ("asymmetric", "clip", "act_order", "clip, asymmetric")
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("store-codes"))
    parser.add_argument("--bits", nargs="+", type=int, choices=(2, 3, 4, 8), default=[4, 3, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--dense", action="store_true", help="prune nothing, so that no way makes up for pruned weights")
    base.add_argument("--updater", help="of the weights that wanda keeps, as in `sparsify.updater`")
    parser.add_argument("--calibration", type=Path, help="records of text; by default the quickstart's")
    parser.add_argument("--samples", type=int, default=32, help="windows of 512 tokens")
    parser.add_argument("--texts", nargs="+", type=Path, help="texts to measure on; by default the quickstart's")
    arguments = parser.parse_args()
    raw = json.loads((RECIPES / "sparsepeft.json").read_text("utf-8"))
    measured = raw["evaluate"]["perplexity"]
    texts = [str(text.absolute()) for text in arguments.texts or ()] or [measured["text"]]
    kept = {key: raw[key] for key in ("schema", "model", "calibration", "sparsify")} | {"name": "codes"}
    kept["calibration"]["samples"] = arguments.samples
    if arguments.calibration:
        kept["calibration"]["data"] = str(arguments.calibration.absolute())
    if arguments.updater:
        kept["sparsify"]["updater"] = arguments.updater
    if arguments.dense:
        del kept["sparsify"]
    orchestrator = Orchestrator(Registry.discover(), arguments.store)

    def line(bits: str, way: str, step: str, **sections: Any) -> None:
        """Measure a step's model on every text, with every seed."""
        evaluate = {"of": [step], "perplexity": [{**measured, "text": text} for text in texts]}
        rows = []
        for seed in arguments.seeds:
            recipe = Recipe.parse({**kept, **sections, "seed": seed, "evaluate": evaluate}, folder=RECIPES)
            rows.append(orchestrator.run(orchestrator.plan(recipe)).report["rows"][0])
        by_text = zip(*([one["perplexity"] for one in row["texts"].values()] for row in rows), strict=True)
        figures = " | ".join(_mean(list(values)) for values in by_text)
        seconds = [row["seconds"] for row in rows if row["seconds"] is not None]  # the recipe's own model was not made
        made = f"{statistics.mean(seconds):.0f} s" if seconds else "–"
        print(f"| {bits} | {way} | {figures} | {made} |", flush=True)

    print(f"| bits | way | {' | '.join(Path(text).stem for text in texts)} | made in |")
    print("|---" * (3 + len(texts)) + "|")
    line("–", "floats", "model" if arguments.dense else "sparsify")
    ways = [way for way in arguments.ways if not (arguments.dense and WAYS[way].get("target") == "dense")]
    for bits in arguments.bits:
        for way in ways:
            quantizer = {"name": "gptq", "options": {"bits": bits, "group_size": 64, **WAYS[way]}}
            line(str(bits), way, "quantize", quantize={"quantizer": quantizer})


def _mean(values: list[float]) -> str:
    """Write the mean, and the standard deviation over seeds where there are several."""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


if __name__ == "__main__":
    main()
