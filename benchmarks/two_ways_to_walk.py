"""The two ways of calibration where both work: the time of running the whole model ÷ that of block by block.

    python benchmarks/two_ways_to_walk.py [--depths 4 8 16 32] [--repeats 5]

A random Llama of hidden size 256 and calibration for Wanda, without anything else. The ways take turns, and the ratio
is that of their medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sqft.api import Statistic
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.calibration.block_runs import RUNS
from sqft.modeling.calibration.walk import walk
from sqft.utils.progress import silent

SAMPLES, LENGTH = 4, 128


def seconds(depth: int, way: str) -> float:
    """Return the time of one walk over a model of that many blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=512, num_hidden_layers=depth, **sizes)).eval()
    windows = torch.randint(512, (SAMPLES, LENGTH))
    norms = frozenset({Statistic.INPUT_NORM})
    start = time.perf_counter()
    walk(model, windows, set(linears(model)), norms, lambda *_: None, "cpu", silent, way=way)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print("| blocks | whole model ÷ block by block |\n|---|---|")
    for depth in arguments.depths:
        times: dict[str, list[float]] = {way: [] for way in RUNS}
        for _ in range(arguments.repeats):
            for way, found in times.items():
                found.append(seconds(depth, way))
        medians = {way: statistics.median(found) for way, found in times.items()}
        print(f"| {depth} | {medians['model'] / medians['blocks']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
