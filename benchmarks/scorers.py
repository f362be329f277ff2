"""Measure what pruning loses: perplexity of the sparse model on several texts, by scorer, updater, pattern, allocator.

    python benchmarks/scorers.py [--ways wanda sparsegpt …] [--seeds 0 1 2] [--store store-scorers]
        [--calibration general.jsonl --samples 64] [--texts prose.txt manuals.txt]

SmolLM2 with half of its weights at zero; recipes differ only in `sparsify`. A seed decides which windows of the
calibration text are drawn. What fits the calibration text is flattered by text of the same kind, so calibrate on
general text, and give texts of other kinds. "won back" is the part of what `wanda` of the same pattern and seed loses,
in log perplexity against the dense model. The store keeps finished steps, so several of these may run at once on one
store; the last one prints the complete table.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
OWL = {"name": "owl", "options": {"outlier": 5, "spread": 0.08}}
SPARSEGPT_BY_INPUT = {"name": "sparsegpt", "options": {"damp": 0.1, "damp_by": "input"}}


def least_squares(**options: Any) -> dict[str, Any]:
    return {"name": "least-squares", "options": options}


WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": "magnitude"},
    "magnitude + least-squares": {"scorer": "magnitude", "updater": "least-squares"},
    "wanda": {"scorer": "wanda"},
    "wanda, owl": {"scorer": "wanda", "allocator": OWL},
    "wanda + least-squares": {"scorer": "wanda", "updater": "least-squares"},
    "wanda + least-squares 0.1": {"scorer": "wanda", "updater": least_squares(damping=0.1)},
    "wanda + least-squares 1": {"scorer": "wanda", "updater": least_squares(damping=1.0)},
    "wanda + least-squares, mean 0.01": {
        "scorer": "wanda",
        "updater": least_squares(damping=0.01, damping_by="mean", steps=30),
    },
    "sparsegpt": {"scorer": "sparsegpt"},
    "sparsegpt, owl": {"scorer": "sparsegpt", "allocator": OWL},
    "sparsegpt 0.1 by input": {"scorer": SPARSEGPT_BY_INPUT},
    "sparsegpt 0.1 by input + least-squares": {"scorer": SPARSEGPT_BY_INPUT, "updater": "least-squares"},
}
WAYS |= {f"{way}, 2:4": {**changes, "pattern": "2:4"} for way, changes in WAYS.items() if "allocator" not in changes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, default=Path("store-scorers"))
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=["wanda", "wanda + least-squares", "sparsegpt"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--calibration", type=Path, help="records of text; by default the quickstart's")
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--texts", nargs="+", type=Path, help="texts to measure on; by default the quickstart's")
    arguments = parser.parse_args()
    raw = json.loads((RECIPES / "sparsepeft.json").read_text("utf-8"))
    kept = {key: raw[key] for key in ("schema", "model", "calibration")} | {"name": "scorers"}
    kept["calibration"]["samples"] = arguments.samples
    if arguments.calibration:
        kept["calibration"]["data"] = str(arguments.calibration.absolute())
    measured = raw["evaluate"]["perplexity"]
    texts = [str(text.absolute()) for text in arguments.texts or ()] or [measured["text"]]
    orchestrator = Orchestrator(Registry.discover(), arguments.store)

    def row(way: str, seed: int, of: str = "sparsify") -> tuple[list[float], dict[str, Any]]:
        """Return the perplexity of each text, and the report's row."""
        sparsify = {"sparsity": 0.5, "pattern": "row", **WAYS[way]}
        evaluate = {"of": [of], "perplexity": [{**measured, "text": text} for text in texts]}
        recipe = Recipe.parse({**kept, "seed": seed, "sparsify": sparsify, "evaluate": evaluate}, folder=RECIPES)
        found = orchestrator.run(orchestrator.plan(recipe)).report["rows"][0]
        return [one["perplexity"] for one in found["texts"].values()], found

    dense, _ = row("wanda", arguments.seeds[0], "model")
    print(f"dense: {', '.join(f'{value:.2f}' for value in dense)}")
    print(f"| way | {' | '.join(f'{Path(text).stem} | won back' for text in texts)} | sparsity | made in |")
    print("|---" * (3 + 2 * len(texts)) + "|")
    for way in arguments.ways:
        base = "wanda, 2:4" if way.endswith("2:4") else "wanda"
        cells, seconds, sparsity = [], [], 0.0
        rows = {seed: row(way, seed) for seed in arguments.seeds}
        bases = {seed: row(base, seed)[0] for seed in arguments.seeds}
        for _, found in rows.values():
            seconds.append(found["seconds"])
            sparsity = found["sparsity"]
        for index in range(len(texts)):
            values = [rows[seed][0][index] for seed in arguments.seeds]
            won = [
                1 - math.log(rows[seed][0][index] / dense[index]) / math.log(bases[seed][index] / dense[index])
                for seed in arguments.seeds
            ]
            cells.append(f"{_mean(values, '.2f')} | {_mean([100 * part for part in won], '.1f')} %")
        print(f"| {way} | {' | '.join(cells)} | {sparsity:.2%} | {statistics.mean(seconds):.0f} s |", flush=True)


def _mean(values: list[float], form: str) -> str:
    """Write the mean, and the standard deviation over seeds where there are several."""
    spread = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{spread}"


if __name__ == "__main__":
    main()
