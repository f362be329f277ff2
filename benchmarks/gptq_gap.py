"""Compare gptq with the best possible codes of each row's kept weights, found by trying all of them.

    python benchmarks/gptq_gap.py [--layers 20]

Layers have 16 rows and 8 inputs, of which each row keeps 4; 4 bits, one group a row. So there are 65,536 combinations
of codes, on the grid that gptq fitted. Inputs are correlated as x = (I + c R) z, with normally distributed R and z.
"""

from __future__ import annotations

import argparse
import statistics
from itertools import product

import torch
from sqft_gptq import Gptq, Rtn
from torch import Tensor

from sqft.api import LinearStats, Quantized
from sqft.kernels.grids import dequantize

OUT, INPUTS, KEPT, BITS = 16, 8, 4, 4


def error(weight: Tensor, value: Tensor, hessian: Tensor) -> Tensor:
    """Return ‖(w − ŵ) X‖² of each row."""
    difference = (weight - value).double()
    return (difference @ hessian.double() * difference).sum(1)


def best(weight: Tensor, mask: Tensor, quantized: Quantized, hessian: Tensor) -> Tensor:
    """The smallest error of each row over all codes of its kept weights, on the same grid."""
    choices = torch.tensor(list(product(range(2**BITS), repeat=KEPT)))
    found = []
    for row in range(OUT):
        value = torch.zeros(len(choices), INPUTS)
        value[:, mask[row]] = quantized.grid.scale[row].float() * (choices - quantized.grid.zero[row])
        found.append(error(weight[row].expand_as(value), value, hessian).min())
    return torch.stack(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=20)
    layers = parser.parse_args().layers
    print("| correlation c | gptq ÷ best | rtn ÷ best | rows where gptq is best |\n|---|---|---|---|")
    for correlation in (0.0, 0.3, 1.0):
        ratios: dict[str, list[float]] = {"gptq": [], "rtn": []}
        exact = []
        for seed in range(layers):
            g = torch.Generator().manual_seed(seed)
            mixing = torch.eye(INPUTS) + correlation * torch.randn(INPUTS, INPUTS, generator=g)
            inputs = torch.randn(512, INPUTS, generator=g) @ mixing
            order = torch.rand(OUT, INPUTS, generator=g).argsort(1)
            mask = order < KEPT
            weight = torch.randn(OUT, INPUTS, generator=g) * mask
            stats = LinearStats(len(inputs), None, inputs.T @ inputs)
            assert stats.hessian is not None
            ours = Gptq(bits=BITS, group_size=-1, damp=1e-6).quantize(weight, mask, stats)
            smallest = best(weight, mask, ours, stats.hessian)
            found = error(weight, dequantize(ours), stats.hessian)
            rounded = Rtn(bits=BITS, group_size=-1).quantize(weight, mask, stats)
            ratios["gptq"].append(float(found.sum() / smallest.sum()))
            ratios["rtn"].append(float(error(weight, dequantize(rounded), stats.hessian).sum() / smallest.sum()))
            exact.append(float((found <= smallest * (1 + 1e-6)).float().mean()))
        medians = [statistics.median(ratios[name]) for name in ("gptq", "rtn")]
        print(f"| {correlation} | {medians[0]:.2f} | {medians[1]:.2f} | {statistics.mean(exact):.0%} |")


if __name__ == "__main__":
    main()
