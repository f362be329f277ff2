"""Seconds of wanda and gptq on one model: sqft's, llm-compressor's, and gptqmodel's gptq. Same windows, grid, damping.

    python benchmarks/compression_speed.py [--samples 16] [--length 256] [--rounds 3] [--store DIR]
        [--llmcompressor PYTHON] [--gptqmodel .consumers/gptqmodel/bin/python]

Each step is timed from the folder that it reads to the one that it writes, so loading and saving are in it, and imports
are not; sqft's steps also read back and check what they wrote, which only the line of JSON has. Each round runs every
program once, in a process of its own; the table has medians, and ratios of sqft's time (without the reading back) to
the other's. llm-compressor needs an environment of its own (`pip install llmcompressor`); without --llmcompressor it is
left out. Needs the model and data of `make quickstart`, and `make consumers` for gptqmodel.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from sqft import Orchestrator, Recipe, Registry
from sqft.modeling.loading import load_model, load_tokenizer
from sqft.modeling.loading.transformers_io import save_model
from sqft.stages.inputs import StepData

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / "examples" / "quickstart" / "data" / "calibration.jsonl"
GROUP_SIZE, DAMP = 64, 0.01
GPTQ = {"name": "gptq", "options": {"bits": 4, "group_size": GROUP_SIZE, "damp": DAMP}}


def recipe(model: Path, samples: int, length: int) -> Recipe:
    """Return wanda, then gptq, of a model."""
    sections = {"sparsify": {"scorer": "wanda", "sparsity": 0.5}, "quantize": {"quantizer": GPTQ}}
    calibration = {"data": str(TEXT), "samples": samples, "length": length}
    return Recipe.parse({"name": "speed", "model": {"path": str(model)}, "calibration": calibration, **sections})


def ours(model: Path, samples: int, length: int) -> dict[str, float]:
    """Compress in a store that is empty; return the seconds of each step."""
    with tempfile.TemporaryDirectory() as store:
        orchestrator = Orchestrator(Registry.discover(), store)
        run = orchestrator.run(orchestrator.plan(recipe(model, samples, length)))
        made = {"wanda": run["sparsify"].artifact.manifest, "gptq": run["quantize"].artifact.manifest}
    seconds = {name: manifest["seconds"] for name, manifest in made.items()}
    return seconds | {f"{name} read back": manifest["verify_seconds"] for name, manifest in made.items()}


def theirs(command: list[Any]) -> dict[str, float]:
    """Run another program; return the seconds that it prints."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--store", type=Path, default=Path("store-speed"))
    parser.add_argument("--llmcompressor", type=Path, help="a Python that has it")
    parser.add_argument("--gptqmodel", type=Path, default=ROOT / ".consumers" / "gptqmodel" / "bin" / "python")
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = arguments.samples, arguments.length
    if arguments.ours:
        print(json.dumps(ours(arguments.ours, *sizes)))
        return
    orchestrator = Orchestrator(Registry.discover(), arguments.store)
    floats, windows = arguments.store / "floats", arguments.store / "windows.safetensors"
    sparse = orchestrator.run(plan := orchestrator.plan(recipe(MODEL, *sizes)), "sparsify")["sparsify"].folder / "model"
    if not floats.is_dir():
        save_model(*load_model(plan.model_spec), floats)
    save_file({"windows": StepData(plan, plan.step("quantize")).calibration(load_tokenizer(plan.model_spec))}, windows)
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    out, here = arguments.store / "out", Path(__file__)
    grid = [GROUP_SIZE, DAMP]
    commands: dict[str, list[Any]] = {
        "sqft": [sys.executable, here, "--ours", floats, "--samples", sizes[0], "--length", sizes[1]]
    }
    if arguments.llmcompressor:
        script = here.with_name("compress_with_llmcompressor.py")
        commands["llm-compressor"] = [arguments.llmcompressor, "-P", script, floats, windows, out, *grid]
    if arguments.gptqmodel.is_file():
        script = here.with_name("quantize_with_gptqmodel.py")
        commands["gptqmodel"] = [arguments.gptqmodel, "-P", script, sparse, windows, out, 4, *grid, 0, 0]
    for number in range(arguments.rounds):
        for program, command in commands.items():
            shutil.rmtree(out, ignore_errors=True)
            found[program].append(theirs(command))
            print(f"round {number + 1}, {program}: {found[program][-1]}", file=sys.stderr, flush=True)
    print("| program | wanda, s | sqft ÷ it | gptq, s | sqft ÷ it |\n|---|---|---|---|---|")
    median = {
        program: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for program, rounds in found.items()
    }
    for program, seconds in median.items():
        cells = [program]
        for name in ("wanda", "gptq"):
            known = seconds.get(name)
            cells += [f"{known:.1f}", f"{median['sqft'][name] / known:.2f}"] if known else ["", ""]
        print(f"| {' | '.join(cells)} |")
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    print(json.dumps(machine | {"threads": torch.get_num_threads(), "samples": sizes, "seconds": found}))


if __name__ == "__main__":
    main()
