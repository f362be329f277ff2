"""Time gptq on single layers, by shape: the factor of the Hessian's inverse, and the loop over the inputs.

    python benchmarks/gptq_layers.py [--shapes 2048x2048 8192x2048 2048x8192] [--repeat 3]

Random weights [out, in], half of them pruned, INT4 in groups of 128, on one thread. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from sqft_gptq.solver import GroupOrder, gptq

from sqft.kernels.hessian import inverse_factor


def seconds(out: int, inputs: int) -> tuple[float, float]:
    """Return the seconds of the factor and of the loop for one layer."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1024, inputs, generator=generator)
    hessian, weight = x.T @ x, torch.randn(out, inputs, generator=generator)
    mask = torch.rand(out, inputs, generator=generator) > 0.5
    turns = GroupOrder.of(hessian.diagonal(), 128, False, True, None)
    hessian = hessian[turns.order][:, turns.order]
    start = time.perf_counter()
    factor = inverse_factor(hessian, 0.01)
    between = time.perf_counter()
    gptq(weight, factor, mask, turns, bits=4, group_size=128, symmetric=True, clip=False)
    return between - start, time.perf_counter() - between


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "8192x2048", "2048x8192"], help="OUTxIN")
    parser.add_argument("--repeat", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("| out × in | factor | loop |\n|---|---|---|")
    for shape in arguments.shapes:
        out, inputs = map(int, shape.split("x"))
        runs = [seconds(out, inputs) for _ in range(arguments.repeat)]
        factor, loop = (statistics.median(run[part] for run in runs) for part in (0, 1))
        print(f"| {out} × {inputs} | {factor:.2f} s | {loop:.2f} s |", flush=True)


if __name__ == "__main__":
    main()
