"""One calibration walk for Wanda and GPTQ against two, on the quickstart's model: perplexity and seconds.

    python benchmarks/one_walk.py [--samples 16] [--length 512] [--ways two masks joint turn]
        [--calibration general.jsonl] [--texts prose.txt manuals.txt]

two     two walks: sparsify's, then one over the sparse model, where earlier blocks are already quantized
turn    the same, and in each block one input after the other (what sqft does)
masks   one walk: Hessians come from sparsify's walk (a dense block after pruned blocks); masks are those of `two`
joint   one walk: a block is pruned and quantized with one Hessian, after blocks that are both; masks differ
`joint` saves the complete first walk. `masks` saves as much, if the sparse model does not exist already.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from sqft_gptq import Gptq
from torch import Tensor, nn

from sqft.api import LinearStats, Statistic
from sqft.checkpoints.model_spec import ModelSpec
from sqft.checkpoints.source import find_model
from sqft.data.windows import calibration_windows, text_windows
from sqft.kernels.grids import dequantize
from sqft.kernels.masks import keep_mask
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.calibration.walk import walk
from sqft.modeling.evaluation import perplexity
from sqft.modeling.loading import load_model
from sqft.utils.digests import Digests
from sqft.utils.progress import silent

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
DATA = ROOT / "examples" / "quickstart" / "data"
HESSIAN = frozenset({Statistic.HESSIAN})


def wanda(weight: Tensor, stats: LinearStats) -> Tensor:
    """The mask of each row's larger half of |W| · ‖X‖; the norms are the Hessian's diagonal."""
    assert stats.hessian is not None
    return keep_mask(weight.abs() * stats.hessian.diagonal().sqrt(), 0.5, "row")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument(
        "--ways", nargs="+", choices=["two", "masks", "joint", "turn"], default=["two", "masks", "joint"]
    )
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.jsonl", help="records of text")
    parser.add_argument("--texts", nargs="+", type=Path, default=[DATA / "heldout.txt"], help="texts of perplexity")
    arguments = parser.parse_args()
    quantizer = Gptq(group_size=64, reorder_groups=False)
    source = find_model(str(MODEL), Path, None, Digests())
    heads = [text.stem for text in arguments.texts]
    print(f"| way | {' | '.join(heads)} | seconds |\n|{'---|' * (len(heads) + 2)}", flush=True)
    for way in arguments.ways:
        model, tokenizer = load_model(ModelSpec(source.path, "float32"))
        windows = calibration_windows(arguments.calibration, tokenizer, arguments.samples, arguments.length, 0)
        later: dict[str, Tensor] = {}

        def prune(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            linear.weight.data *= wanda(linear.weight, stats)

        def quantize(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            weight = linear.weight.detach().clone()
            linear.weight.data.copy_(dequantize(quantizer.quantize(weight, weight != 0, stats)))

        def both(name: str, linear: nn.Linear, stats: LinearStats) -> None:
            prune(name, linear, stats)
            quantize(name, linear, stats)

        def aside(name: str, linear: nn.Linear, stats: LinearStats, later: dict[str, Tensor] = later) -> None:
            prune(name, linear, stats)
            later[name] = dequantize(quantizer.quantize(linear.weight.detach(), linear.weight != 0, stats))

        start = time.monotonic()
        steps = {"two": (prune, quantize), "turn": (prune, quantize), "masks": (aside,), "joint": (both,)}
        for compress in steps[way]:
            in_turn = way == "turn" and compress is quantize
            walk(model, windows, set(linears(model)), HESSIAN, compress, "cpu", silent, in_turn)
        seconds = time.monotonic() - start
        for name, value in later.items():
            model.get_parameter(f"{name}.weight").data.copy_(value)
        with torch.inference_mode():
            windows_of = (text_windows(text, tokenizer, 8192, 1024) for text in arguments.texts)
            found = [perplexity(model, held_out, silent)["perplexity"] for held_out in windows_of]
        print(f"| {way} | {' | '.join(f'{one:.2f}' for one in found)} | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
