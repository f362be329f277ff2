"""Our gptq and gptqmodel's, on the same model, grid, damping, order and calibration: perplexity, and zeros kept.

    python benchmarks/gptq_against_gptqmodel.py [--sparse] [--orders unchanged reordered act-order] [--seeds 0]
        [--calibration general.jsonl --samples 16] [--texts prose.txt manuals.txt]
        [--python .consumers/gptqmodel/bin/python] [--store DIR]

With --sparse, both quantize the model of which wanda has set half of the weights to zero; gptqmodel does not keep them
there. gptqmodel runs in its own environment (`make consumers`). sqft reads and measures both checkpoints, gptqmodel's
like any model that was quantized elsewhere. Needs the model and data of `make quickstart`.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from sqft import Orchestrator, Recipe, Registry
from sqft.modeling.loading import load_model, load_tokenizer
from sqft.modeling.loading.transformers_io import save_model
from sqft.planning.plan import Plan
from sqft.stages.inputs import StepData

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT / "examples" / "quickstart" / "data"
BITS, GROUP_SIZE, DAMP, LENGTH = 4, 64, 0.01, 512
ORDERS = {"unchanged": (False, False), "reordered": (False, True), "act-order": (True, False)}
"""act_order and reorder_groups."""


def recipe(name: str, model: Path, texts: list[Path], **sections: Any) -> Recipe:
    made = "quantize" if "quantize" in sections else "sparsify" if "sparsify" in sections else "model"
    measured = [{"text": str(text.absolute()), "tokens": 8192, "length": 1024} for text in texts]
    raw = {"name": name, "model": {"path": str(model)}, **sections}
    return Recipe.parse({**raw, "evaluate": {"of": [made], "perplexity": measured}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sparse", action="store_true", help="quantize the model that wanda made half sparse")
    parser.add_argument("--orders", nargs="+", choices=list(ORDERS), default=list(ORDERS), help="of the inputs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="each draws other calibration windows")
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.jsonl")
    parser.add_argument("--samples", type=int, default=16, help="windows of 512 tokens")
    parser.add_argument("--texts", nargs="+", type=Path, default=[DATA / "heldout.txt"])
    parser.add_argument("--python", type=Path, default=ROOT / ".consumers" / "gptqmodel" / "bin" / "python")
    parser.add_argument("--store", type=Path, default=Path("store-gptq"))
    arguments = parser.parse_args()
    orchestrator = Orchestrator(Registry.discover(), arguments.store)

    def measured(wanted: Recipe) -> str:
        row = orchestrator.run(orchestrator.plan(wanted)).report["rows"][0]
        figures = [f"{one['perplexity']:.3f}" for one in row["texts"].values()]
        return " | ".join([*figures, f"{row['sparsity']:.2%}"])

    print(f"| seed | inputs | made by | {' | '.join(text.stem for text in arguments.texts)} | sparsity |")
    print("|---" * (4 + len(arguments.texts)) + "|")
    for seed in arguments.seeds:
        text = {"data": str(arguments.calibration.absolute()), "samples": arguments.samples, "length": LENGTH}
        shared: dict[str, Any] = {"seed": seed, "calibration": text}
        if arguments.sparse:
            shared["sparsify"] = {"scorer": "wanda", "sparsity": 0.5, "pattern": "row"}
        base = recipe("floats", MODEL, arguments.texts, **shared)
        floats = _floats(orchestrator, arguments.store, base)
        print(f"| {seed} | | (floats) | {measured(base)} |", flush=True)
        for order in arguments.orders:
            act_order, reorder = ORDERS[order]
            options = {"bits": BITS, "group_size": GROUP_SIZE, "damp": DAMP}
            options |= {"act_order": act_order, "reorder_groups": reorder}
            quantize = {"quantizer": {"name": "gptq", "options": options}}
            ours = recipe("ours", MODEL, arguments.texts, **shared, quantize=quantize)
            print(f"| {seed} | {order} | sqft | {measured(ours)} |", flush=True)
            plan = orchestrator.plan(ours)
            label = plan.step("quantize").fingerprint[:12]  # of model, text, seed, order
            out = arguments.store / f"theirs-{label}"
            if not out.is_dir():
                windows = arguments.store / f"windows-{label}.safetensors"
                save_file({"windows": _windows(plan)}, windows)
                script = Path(__file__).with_name("quantize_with_gptqmodel.py")
                words = [floats, windows, out, BITS, GROUP_SIZE, DAMP, int(act_order)]
                command = [str(arguments.python), "-P", str(script), *map(str, words), str(int(reorder))]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"gptqmodel failed:\n{done.stderr[-2000:]}")
            print(f"| {seed} | {order} | gptqmodel | {measured(recipe('theirs', out, arguments.texts))} |", flush=True)


def _floats(orchestrator: Orchestrator, store: Path, wanted: Recipe) -> Path:
    """Return the folder of the model that both quantize."""
    plan = orchestrator.plan(wanted)
    if plan.recipe.sparsify:
        return orchestrator.run(plan)["sparsify"].folder / "model"
    folder = store / "floats"
    if not folder.is_dir():
        save_model(*load_model(plan.model_spec), folder)
    return folder


def _windows(plan: Plan) -> Tensor:
    """Return the calibration windows that our quantize step saw."""
    return StepData(plan, plan.step("quantize")).calibration(load_tokenizer(plan.model_spec))


if __name__ == "__main__":
    main()
