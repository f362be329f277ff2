"""Measure what pruning loses: perplexity of the sparse model by scorer, pattern and allocator.

    python benchmarks/scorers.py [--store store-scorers] [--ways wanda sparsegpt …]

SmolLM2 with half of its weights at zero, 16 windows of 512 tokens. The recipes differ only in `sparsify`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
OWL = {"name": "owl", "options": {"outlier": 5, "spread": 0.08}}
WAYS: dict[str, dict[str, Any]] = {
    "magnitude": {"scorer": "magnitude"},
    "wanda": {"scorer": "wanda"},
    "wanda, owl": {"scorer": "wanda", "allocator": OWL},
    "sparsegpt": {"scorer": "sparsegpt"},
    "sparsegpt, layer": {"scorer": "sparsegpt", "pattern": "layer"},
    "sparsegpt, owl": {"scorer": "sparsegpt", "allocator": OWL},
    "wanda, 2:4": {"scorer": "wanda", "pattern": "2:4"},
    "sparsegpt, 2:4": {"scorer": "sparsegpt", "pattern": "2:4"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", type=Path, default=Path("store-scorers"))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    arguments = parser.parse_args()
    orchestrator = Orchestrator(Registry.discover(), arguments.store)
    raw = json.loads((RECIPES / "sparsepeft.json").read_text("utf-8"))
    kept = {key: raw[key] for key in ("schema", "model", "calibration")}
    measured = {"of": ["model", "sparsify"], "perplexity": raw["evaluate"]["perplexity"]}
    print("| way | perplexity | dense | sparsity | made in |\n|---|---|---|---|---|")
    for way in arguments.ways:
        sparsify = {"sparsity": 0.5, "pattern": "row", **WAYS[way]}
        recipe = {**kept, "name": "scorers", "sparsify": sparsify, "evaluate": measured}
        dense, row = orchestrator.run(orchestrator.plan(Recipe.parse(recipe, folder=RECIPES))).report["rows"]
        print(
            f"| {way} | {row['perplexity']:.2f} | {dense['perplexity']:.2f} | {row['sparsity']:.2%} "
            f"| {row['seconds']:.0f} s |",
            flush=True,
        )


if __name__ == "__main__":
    main()
