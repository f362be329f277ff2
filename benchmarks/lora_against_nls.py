"""LoRA against NLS on the quickstart's task, over several seeds: the same steps and data, SparsePEFT on Wanda.

    python benchmarks/lora_against_nls.py [--seeds 0 1 2] [--adapters lora nls] [--store store-seeds]

A seed decides calibration windows, initial factors, data order and rank samples; the data stay the same. The store
keeps finished steps: several of these may run at once, and the last one prints the complete table. Needs the model and
data of `make quickstart`.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from sqft import Orchestrator, Recipe, Registry

RECIPE = Path(__file__).parents[1] / "examples" / "recipes" / "quickstart.json"
ADAPTERS = {
    "lora": {"name": "lora", "options": {"rank": 32, "alpha": 64}},
    "nls": {"name": "nls", "options": {"ranks": [32, 24, 16], "alpha": 64}},
}


def recipe(adapter: str, seed: int) -> Recipe:
    raw = json.loads(RECIPE.read_text())
    raw |= {"name": f"{adapter}-seed-{seed}", "seed": seed}
    raw["sparsify"]["updater"] = None
    raw["finetune"] |= {"adapter": ADAPTERS[adapter], "merger": "sparsepeft", "learning_rate": 2e-3}
    # LoRA has one configuration; of NLS also what hill-climbing finds.
    raw["evaluate"]["of"] = ["finetune:heuristic", *(["search"] if adapter == "nls" else [])]
    if adapter == "lora":
        raw["search"] = {}
    raw.pop("merge")
    return Recipe.parse(raw, folder=RECIPE.parent)


def rows(adapter: str, seed: int, store: Path) -> list[dict[str, Any]]:
    orchestrator = Orchestrator(Registry.discover(), store)
    rows: list[dict[str, Any]] = orchestrator.run(orchestrator.plan(recipe(adapter, seed))).report["rows"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--adapters", nargs="+", choices=list(ADAPTERS), default=list(ADAPTERS))
    parser.add_argument("--store", type=Path, default=Path("store-seeds"))
    arguments = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in arguments.seeds:
        for adapter in arguments.adapters:
            for row in rows(adapter, seed, arguments.store):
                label = row["configuration"].removeprefix("finetune:")
                label = adapter if adapter == "lora" else f"nls, {label}"
                found.setdefault(label, []).append(row)
    seeds_said = ", ".join(map(str, arguments.seeds))
    print(f"| configuration | accuracy by seed ({seeds_said}) | mean ± sd | perplexity by seed |")
    print("|---|---|---|---|")
    for label, seeds in found.items():
        accuracies = [row["accuracy"] for row in seeds]
        spread = f" ± {statistics.stdev(accuracies):.1%}" if len(accuracies) > 1 else ""
        cells = [
            ", ".join(f"{accuracy:.1%}" for accuracy in accuracies),
            f"{statistics.mean(accuracies):.1%}{spread}",
            ", ".join(f"{row['perplexity']:.1f}" for row in seeds),
        ]
        print(f"| {label} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
