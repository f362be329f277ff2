"""Time gptq on single layers, by shape: the Hessian, the factor of its inverse, and the loop over the inputs.

    python benchmarks/gptq_layers.py [--shapes 2048x2048 8192x2048 2048x8192] [--tokens 1024] [--repeat 3]
    PYTHONPATH=.:plugins .consumers/gptqmodel/bin/python benchmarks/gptq_layers.py --gptqmodel

Random weights [out, in], half of them pruned, INT4 in groups of 128, symmetric, damped by 0.01, inputs in order.
Medians. With --gptqmodel, in its environment (`make consumers`), gptqmodel's own GPTQ of the same layers takes turns
with it: its `add_batch` and `quantize`. Then a ratio is ours divided by gptqmodel's, of medians. That keeps no zeros.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import time

import torch
from sqft_gptq.solver import GroupOrder, gptq
from torch import Tensor, nn

from sqft.kernels.hessian import inverse_factor

GROUP_SIZE, DAMP = 128, 0.01


def ours(x: Tensor, weight: Tensor, mask: Tensor) -> list[float]:
    """Return the seconds of the Hessian, of the factor and of the loop for one layer."""
    times = [time.perf_counter()]
    hessian = x.T @ x
    times.append(time.perf_counter())
    turns = GroupOrder.of(hessian.diagonal(), GROUP_SIZE, False, False, None)
    factor = inverse_factor(hessian, DAMP)
    times.append(time.perf_counter())
    gptq(weight, factor, mask, turns, bits=4, group_size=GROUP_SIZE, symmetric=True, clip=False)
    times.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(times)]


def gptqmodels(x: Tensor, weight: Tensor) -> list[float]:
    """Return the seconds of gptqmodel's statistics and of the rest for one layer."""
    from gptqmodel import QuantizeConfig
    from gptqmodel.quantization.gptq import GPTQ

    settings = {"desc_act": False, "act_group_aware": False, "damp_percent": DAMP, "device": "cpu"}
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = weight.clone()
    with contextlib.redirect_stdout(io.StringIO()):
        solver = GPTQ(linear, QuantizeConfig(bits=4, group_size=GROUP_SIZE, sym=True, **settings))
        solver.quantizer.configure(perchannel=True)
        start = time.perf_counter()
        solver.add_batch(x[None], x[None] @ weight.T * 0)
        between = time.perf_counter()
        solver.quantize()
        return [between - start, time.perf_counter() - between]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "8192x2048", "2048x8192"], help="OUTxIN")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gptqmodel", action="store_true", help="beside gptqmodel's")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    heads = ["out × in", "Hessian", "factor", "loop"]
    heads += ["gptqmodel's Hessian", "the rest", "ratio"] if arguments.gptqmodel else []
    print(f"| {' | '.join(heads)} |\n{'|---' * len(heads)}|")
    for shape in arguments.shapes:
        out, inputs = map(int, shape.split("x"))
        generator = torch.Generator().manual_seed(0)
        x, weight = (torch.randn(rows, inputs, generator=generator) for rows in (arguments.tokens, out))
        mask = torch.rand(out, inputs, generator=generator) > 0.5
        found = []
        for _ in range(arguments.repeat):
            found.append(ours(x, weight * mask, mask) + (gptqmodels(x, weight * mask) if arguments.gptqmodel else []))
        medians = [statistics.median(column) for column in zip(*found, strict=True)]
        cells = [f"{out} × {inputs}", *(f"{median:.2f} s" for median in medians)]
        cells += [f"{sum(medians[:3]) / sum(medians[3:]):.2f}"] if arguments.gptqmodel else []
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
