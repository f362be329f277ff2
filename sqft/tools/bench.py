"""The paper's Tables 6 and 7 for your recipes on your machine: what each pipeline costs to train, keep and serve.

Every measurement runs in a new process, so that its peak memory is its own. The recipes take turns, round after
round, and medians are reported, since timings vary on any machine.
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
from sqft.errors import ModelError, Problem, RecipeError, SqftError
from sqft.execution.orchestrator import Orchestrator
from sqft.execution.run import Run
from sqft.utils.text import human_size

PROMPT_TOKENS = 512
"""Length of the prompt; less in a shorter window."""
GENERATED_TOKENS = 32
"""Tokens generated after the prompt."""
REPEATS = 3
"""Generations that one process measures."""
BENCH_ONLY_OVERRIDE = "finetune.max_grad_norm=1e12"
"""Clips nothing, and no real recipe has it: a measurement's artifact, which is deleted, is never one of the user's."""
HEADS = [
    "recipe", "mergeable", "final precision", "storage", "training, steps/s", "training memory", "prefill, tokens/s",
    "decode, tokens/s", "layers in the int4 kernel", "serving memory", "accuracy",
]  # fmt: skip


def bench(
    recipes: Sequence[Path], changes: Sequence[str], store: Path, rounds: int, steps: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Run the recipes as far as they are not done, then measure; return a row of facts and medians for each.

    Args:
        recipes: recipe files; each must fine-tune, and merge if its merger can.
        changes: changes to every recipe ("finetune.steps=9").
        store: the store's folder.
        rounds: measurements of each recipe.
        steps: training steps in each measurement.
        say: called with a line of progress.

    Raises:
        RecipeError: when a recipe does not fine-tune, or could be merged and is not.
        SqftError: when a measurement fails.
    """
    orchestrator = Orchestrator(Registry.discover(), store)
    plans = [orchestrator.load(path, changes) for path in recipes]
    for path, plan in zip(recipes, plans, strict=True):
        if plan.recipe.finetune is None:
            raise unsuitable(path, "finetune", "this recipe fine-tunes nothing; bench compares recipes that do")
        merger = plan.step("finetune").component(Merger)
        if merger.merges and plan.recipe.merge is None:
            raise unsuitable(
                path,
                "merge",
                'this recipe could merge its adapter but does not, and bench measures finished models; add "merge": {}',
            )
    rows = [_facts(orchestrator.run(plan)) for plan in plans]
    measured: list[dict[str, list[Any]]] = [{} for _ in recipes]
    for number in range(rounds):
        for path, values in zip(recipes, measured, strict=True):
            for task in ("train", "serve"):
                say(f"round {number + 1} of {rounds}: {task} {path.stem}")
                for key, value in _in_new_process(task, path, changes, store, steps).items():
                    values.setdefault(key, []).append(value)
    return [
        row | {key: statistics.median(v) for key, v in values.items()}
        for row, values in zip(rows, measured, strict=True)
    ]


def unsuitable(recipe: Path, place: str, message: str) -> RecipeError:
    """Return the error that a recipe cannot be compared."""
    return RecipeError([Problem(place, message)], str(recipe))


def table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return the rows as text, with ratios to the first."""
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
    """Return what is known without measuring. Storage is of what is delivered: a merged model, or base and adapter."""
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


def _in_new_process(task: str, recipe: Path, changes: Sequence[str], store: Path, steps: int) -> dict[str, float]:
    """Take one measurement in a new process.

    Args:
        task: "train" or "serve".
        recipe: the recipe's file.
        changes: to the recipe, as `--set` takes them.
        store: the folder of the store.
        steps: training steps to take.

    Raises:
        SqftError: when the process fails.
    """
    command = [
        sys.executable,
        "-P",
        "-m",
        "sqft.tools.bench",
        task,
        str(recipe),
        json.dumps(list(changes)),
        str(store),
        str(steps),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"TOKENIZERS_PARALLELISM": "false"})
    if done.returncode:
        log = store / "bench.log"
        log.write_text(done.stderr, "utf-8")
        last = done.stderr.strip().rpartition("\n")[2] or f"its process ended with {done.returncode}"
        raise SqftError(f"measuring {recipe} failed: {last} (the complete output is in {log})")
    values: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return values


def train(recipe: Path, changes: Sequence[str], store: Path, steps: int) -> dict[str, float]:
    """Measure a few steps of fine-tuning; their artifact is deleted."""
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
    """Measure generation with the finished model."""
    from sqft.tools import serving
    from sqft.utils.resources import peak_memory

    orchestrator = Orchestrator(Registry.discover(), store)
    run = orchestrator.run(orchestrator.load(recipe, changes))
    if "merge" in run:
        model = serving.load_merged_for_serving(run.plan.spec(run["merge"].folder / "model"))
    else:
        folders = run.inputs("finetune")
        model = serving.load_adapted_for_serving(run.plan, folders, run["finetune"].folder, run["search"].folder)
    window = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT_TOKENS + GENERATED_TOKENS
    )
    if (prompt := min(PROMPT_TOKENS, window - GENERATED_TOKENS)) < 1:
        raise ModelError(f"a window of {window} tokens has no room for a prompt and {GENERATED_TOKENS} tokens after it")
    with peak_memory() as peak:
        speed = serving.measure_speed(model, prompt, GENERATED_TOKENS, REPEATS)
    in_kernel, packed = serving.count_kernel_layers(model)
    return {
        "prefill": speed.prefill,
        "decode": speed.decode,
        "serving_memory": peak[0],
        "kernel_layers": in_kernel,
        "packed_layers": packed,
    }


if __name__ == "__main__":
    task, recipe, changes, store, steps = sys.argv[1:]
    arguments = (Path(recipe), json.loads(changes), Path(store))
    with redirect_stdout(sys.stderr):  # only the result is output, not what a library prints
        values = train(*arguments, int(steps)) if task == "train" else serve(*arguments)
    print(json.dumps(values))
