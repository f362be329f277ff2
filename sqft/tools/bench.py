"""The paper's Tables 6 and 7 for your recipes on your machine: what each pipeline costs to train, keep and serve.

Every measurement is a process of its own, so that its peak memory is its own; the recipes take turns, round after
round, and medians are taken, since machines are noisy.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from sqft.components.kinds import Merger
from sqft.components.registry import Registry
from sqft.errors import StageError
from sqft.execution.orchestrator import Orchestrator
from sqft.execution.run import Run
from sqft.utils.text import human_size

PROMPT, GENERATED, REPEATS = 512, 32, 3
"""Tokens of a prompt (fewer in a shorter window), tokens generated after it, and how often in one process."""


BENCH_ONLY_OVERRIDE = "finetune.max_grad_norm=1e12"
"""Clips nothing, and no recipe says so: a measurement's artifact, which is thrown away, is never one of the user's."""


HEADS = [
    "recipe", "mergeable", "final precision", "storage", "training, steps/s", "training memory", "prefill, tokens/s",
    "decode, tokens/s", "layers in the int4 kernel", "serving memory", "accuracy",
]  # fmt: skip


def bench(
    recipes: Sequence[Path], changes: Sequence[str], store: Path, rounds: int, steps: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the recipes to their end where they are not, then measure; a row of facts and medians for each.

    Raises:
        StageError: when a recipe does not fine-tune, could be merged and is not, or a measurement fails.
    """
    orchestrator = Orchestrator(Registry.discover(), store)
    plans = [orchestrator.load(path, changes) for path in recipes]
    for path, plan in zip(recipes, plans, strict=True):
        if plan.recipe.finetune is None:
            raise StageError(f"{path} fine-tunes nothing; bench compares recipes with a finetune section")
        merger = plan.step("finetune").component(Merger)
        if merger.merges and plan.recipe.merge is None:
            raise StageError(
                f"{path} trains what can be merged and does not merge it, and bench serves what is shipped; "
                'add "merge": {}'
            )
    rows = [_facts(orchestrator.run(plan)) for plan in plans]
    measured: list[dict[str, list[Any]]] = [{} for _ in recipes]
    for number in range(rounds):
        for path, found in zip(recipes, measured, strict=True):
            for what in ("train", "serve"):
                say(f"round {number + 1} of {rounds}: {what} {path.stem}")
                for key, value in _elsewhere(what, path, changes, store, steps).items():
                    found.setdefault(key, []).append(value)
    return [
        row | {key: statistics.median(v) for key, v in found.items()} for row, found in zip(rows, measured, strict=True)
    ]


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows as text, with ratios to the first."""
    first = rows[0]

    def ratio(row: dict[str, Any], key: str, form: Callable[[float], str]) -> str:
        return f"{form(row[key])} ({row[key] / first[key]:.2f})"

    return [
        [
            row["recipe"],
            "yes" if row["mergeable"] else "no",
            row["precision"],
            ratio(row, "storage", human_size),
            ratio(row, "steps_per_second", "{:.2f}".format),
            ratio(row, "training_memory", human_size),
            ratio(row, "prefill", "{:.0f}".format),
            ratio(row, "decode", "{:.1f}".format),
            f"{row['kernel_layers']:.0f} of {row['packed_layers']:.0f}" if row["packed_layers"] else "–",
            ratio(row, "serving_memory", human_size),
            f"{row['accuracy']:.1%}" if row["accuracy"] is not None else "–",
        ]
        for row in rows
    ]  # fmt: skip


def _facts(run: Run) -> dict[str, Any]:
    """What is known without a clock. Storage is what is shipped: a merged model, or a base and an adapter."""
    plan = run.plan
    merger = plan.step("finetune").component(Merger)
    floats, codes = plan.recipe.model.dtype, f"INT{_bits(run)}" if plan.adapter_base.quantized else ""
    if "merge" in run:
        folders = [run["merge"].folder / "model"]
    else:
        folders = [plan.adapter_base.model(run.inputs("search")), run["search"].folder / "adapter"]
    rows = {row["configuration"].partition(" ")[0]: row for row in run.report["rows"]}
    final = rows.get("merge") or rows.get("search") or {}
    return {
        "recipe": plan.recipe.name,
        "mergeable": merger.merges,
        "precision": (codes or floats) if merger.merges else f"{codes or floats} + {floats}",
        "storage": sum(file.stat().st_size for folder in folders for file in folder.glob("*.safetensors")),
        "accuracy": final.get("accuracy"),
    }


def _bits(run: Run) -> int:
    return int((run.plan.source.quantization or run["quantize"].report)["bits"])


def _elsewhere(what: str, recipe: Path, changes: Sequence[str], store: Path, steps: int) -> dict[str, float]:
    """One measurement in a new process."""
    command = [
        sys.executable,
        "-P",
        "-m",
        "sqft.tools.bench",
        what,
        str(recipe),
        json.dumps(list(changes)),
        str(store),
        str(steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        log = store / "bench.log"
        log.write_text(done.stderr, "utf-8")
        said = done.stderr.strip().rpartition("\n")[2] or f"its process ended with {done.returncode}"
        raise StageError(f"measuring {recipe} failed: {said} (the complete output is in {log})")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def train(recipe: Path, changes: Sequence[str], store: Path, steps: int) -> dict[str, float]:
    """A few steps of fine-tuning, whose artifact is thrown away."""
    orchestrator = Orchestrator(Registry.discover(), store)
    shorter = [
        f"finetune.steps={steps}",
        "finetune.warmup_steps=0",
        "finetune.report_to=[]",
        BENCH_ONLY_OVERRIDE,
        "search={}",
        'name="bench"',
    ]
    plan = orchestrator.load(recipe, [*changes, *shorter])
    try:
        artifact = orchestrator.run(plan, "finetune", "finetune")["finetune"].artifact
        seconds, peak = artifact.report["step_seconds"], artifact.manifest["peak_memory"]
    finally:
        orchestrator.store.discard("finetune", plan.step("finetune").fingerprint)
    return {"steps_per_second": 1 / seconds, "training_memory": peak}


def serve(recipe: Path, changes: Sequence[str], store: Path) -> dict[str, float]:
    """The finished model as it would be served."""
    from sqft.tools import serving
    from sqft.utils.resources import peak_memory

    orchestrator = Orchestrator(Registry.discover(), store)
    run = orchestrator.run(orchestrator.load(recipe, changes))
    if "merge" in run:
        model = serving.merged_as_served(run.plan.spec(run["merge"].folder / "model"))
    else:
        folders = run.inputs("finetune")
        model = serving.adapted_as_served(run.plan, folders, run["finetune"].folder, run["search"].folder)
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT + GENERATED
    if (prompt := min(PROMPT, window - GENERATED)) < 1:
        raise StageError(f"a window of {window} tokens has no room for a prompt and {GENERATED} tokens after it")
    with peak_memory() as peak:
        found = serving.speed(model, prompt, GENERATED, REPEATS)
    taken, packed = serving.count_kernel_layers(model)
    return {
        "prefill": found.prefill,
        "decode": found.decode,
        "serving_memory": peak[0],
        "kernel_layers": taken,
        "packed_layers": packed,
    }


if __name__ == "__main__":
    what, recipe, changes, store, steps = sys.argv[1:]
    arguments = (Path(recipe), json.loads(changes), Path(store))
    with redirect_stdout(sys.stderr):  # whatever a library has to say
        found = train(*arguments, int(steps)) if what == "train" else serve(*arguments)
    print(json.dumps(found))
