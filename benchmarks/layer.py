"""Forward and backward of one layer: SparsePEFT fused, SparsePEFT as two naive paths, and stock PEFT LoRA.

    python benchmarks/layer.py [--repeats 15] [--dtype float32]

The three take turns, and medians are printed, with ratios to LoRA. "kept" is the memory that autograd holds
between forward and backward: the storages of saved tensors, without parameters and the layer's input.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from sqft_nls.adapter import Nls
from sqft_sparsepeft import SparsePEFT
from torch import Tensor, nn

from sqft.api import LinearShape
from sqft.modeling.adapters.adapted_linear import adapt
from sqft.modeling.adapters.frozen_weight import FloatWeight

RANK, TOKENS = 32, 2048
SIZES = ((2048, 2048), (1536, 576), (4096, 4096))  # (out, in)


class Naive(nn.Module):
    """W x + scale ((BA) ⊙ M) x in plain autograd."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.mask = (linear.weight != 0).to(linear.weight.dtype)
        self.A = nn.Parameter(torch.randn(RANK, linear.in_features) * 0.01)
        self.B = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        low = (self.B @ self.A * 2.0).to(x.dtype) * self.mask
        return F.linear(x, self.weight) + F.linear(x, low)


def layers(out: int, inputs: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    def linear() -> nn.Linear:
        torch.manual_seed(0)
        made = nn.Linear(inputs, out, bias=False, dtype=dtype).requires_grad_(False)
        made.weight[torch.rand(out, inputs) < 0.5] = 0
        return made

    lora = get_peft_model(nn.Sequential(linear()), LoraConfig(r=RANK, lora_alpha=64, target_modules=["0"]))
    delta = Nls(ranks=(RANK,)).delta(LinearShape("l", out, inputs), torch.Generator().manual_seed(0))
    fused = adapt(FloatWeight(linear().weight, True), None, delta, SparsePEFT())
    return {"LoRA (peft)": lora, "naive two paths": Naive(linear()), "SparsePEFT fused": fused}


def once(layer: nn.Module, x: Tensor, grad: Tensor) -> float:
    start = time.perf_counter()
    layer(x).backward(grad)
    return time.perf_counter() - start


def kept(layer: nn.Module, x: Tensor) -> int:
    """Bytes that forward leaves for backward, each storage once."""
    known = {p.untyped_storage().data_ptr() for p in [x, *layer.parameters()]}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        y = layer(x)
    del y
    return sum(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    arguments = parser.parse_args()
    dtype = getattr(torch, arguments.dtype)
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.dtype}, rank {RANK}, {TOKENS} tokens"
    )
    print("\n| layer (out × in) | form | median ms | ÷ LoRA | kept MiB |\n|---|---|---|---|---|")
    for out, inputs in SIZES:
        x = torch.randn(TOKENS, inputs, dtype=dtype).requires_grad_()
        grad = torch.randn(TOKENS, out, dtype=dtype)
        made = layers(out, inputs, dtype)
        times: dict[str, list[float]] = {name: [] for name in made}
        for layer in made.values():
            once(layer, x, grad)
        for _ in range(arguments.repeats):
            for name, layer in made.items():
                times[name].append(once(layer, x, grad))
        lora = statistics.median(times["LoRA (peft)"])
        for name, layer in made.items():
            median = statistics.median(times[name])
            memory = kept(layer, x) / 2**20
            print(f"| {out} × {inputs} | {name} | {median * 1e3:.1f} | {median / lora:.2f} | {memory:.1f} |")


if __name__ == "__main__":
    main()
