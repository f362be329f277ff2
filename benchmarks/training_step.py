"""A training step of sqft's adapters and of stock PEFT's LoRA on one model: medians, and ratios to LoRA.

    python benchmarks/training_step.py [--shape 135m] [--dtype float32] [--batch-size 4] [--length 256] [--blocks 30]
        [--ways sparsepeft hira qa-sparsepeft codes] [--checkpointing] [--repeats 7]

A model of SmolLM2-135M's shape (or Llama 3.2 1B's) with random weights, half of them zero; rank 32 on q, k, v, up and
down; a label at every token. A step is forward, backward and AdamW, as in Trainer. LoRA has transformers' own model and
loss. The ways take turns. "qa-sparsepeft" trains floats through a 4-bit grid, groups of 64, and "codes" packed codes;
the two have the same adapter. Peak memory is not measured: the models are in one process.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from sqft_hira import Hira
from sqft_nls.adapter import Nls
from sqft_sparsepeft import QASparsePEFT, SparsePEFT
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from sqft.kernels.grids import fit_grid, quantize
from sqft.modeling.adapters.adapted_linear import attach
from sqft.modeling.adapters.frozen_weight import FloatWeight, FrozenWeight, PackedWeight
from sqft.modeling.architecture.blocks import linears, shape_of
from sqft.modeling.compat import compute_activations_again
from sqft.modeling.training.loss import CompletionLoss
from sqft.types import Grid, Quantized

RANK, GROUP = 32, 64
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
SHAPES = {
    "135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                 "num_key_value_heads": 3, "vocab_size": 49152},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
               "num_key_value_heads": 8, "vocab_size": 128256},
}  # fmt: skip
Step = Callable[[Tensor], None]


def sparse_model(shape: str, blocks: int | None, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = SHAPES[shape] | ({"num_hidden_layers": blocks} if blocks else {})
    config = LlamaConfig(tie_word_embeddings=True, **sizes)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)
    for name in linears(model):
        weight = model.get_parameter(f"{name}.weight")
        weight[torch.rand(weight.shape) < 0.5] = 0
    model.train()
    return model


def grid_of(weight: Tensor) -> Grid:
    scale, zero = fit_grid(weight.float().reshape(len(weight), -1, GROUP), 4, symmetric=True)
    return Grid(scale.half(), zero, GROUP, 4, None)


def frozen(way: str, weight: Tensor) -> FrozenWeight:
    if way not in ("qa-sparsepeft", "codes"):
        return FloatWeight(weight, True)
    grid = grid_of(weight)
    if way == "qa-sparsepeft":
        return FloatWeight(weight, True, grid)
    return PackedWeight(Quantized(quantize(weight, grid), grid), weight != 0, weight.dtype)


def stepping(loss: Callable[[Tensor], Tensor], model: nn.Module) -> Step:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step(ids: Tensor) -> None:
        torch.autograd.backward(loss(ids))
        optimizer.step()
        optimizer.zero_grad()

    return step


def stock(model: PreTrainedModel, checkpointing: bool) -> Step:
    if checkpointing:
        compute_activations_again(model)
    lora = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=64, target_modules=list(TARGETS)))
    return stepping(lambda ids: lora(input_ids=ids, labels=ids, use_cache=False).loss, lora)


def ours(way: str, model: PreTrainedModel, checkpointing: bool) -> Step:
    if checkpointing:
        compute_activations_again(model)
    layers = {name: layer for name, layer in linears(model).items() if name.endswith(TARGETS)}
    adapter, generator = Nls(ranks=(RANK,)), torch.Generator().manual_seed(0)
    deltas = {name: adapter.delta(shape_of(name, layer), generator) for name, layer in layers.items()}
    bases = {name: frozen(way, layer.weight.detach()) for name, layer in layers.items()}
    merger = {"sparsepeft": SparsePEFT, "hira": Hira}.get(way, QASparsePEFT)()
    attach(model, deltas, merger, bases)
    complete = CompletionLoss(model)
    return stepping(lambda ids: complete(input_ids=ids, labels=ids)["loss"], complete)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="135m")
    parser.add_argument("--blocks", type=int, help="unless given, the shape's")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--ways", nargs="+", default=["sparsepeft", "hira", "qa-sparsepeft", "codes"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    made = {}
    for way in ["LoRA (peft)", *arguments.ways]:
        model = sparse_model(arguments.shape, arguments.blocks, getattr(torch, arguments.dtype))
        plain = way == "LoRA (peft)"
        made[way] = stock(model, arguments.checkpointing) if plain else ours(way, model, arguments.checkpointing)
    ids = torch.randint(SHAPES[arguments.shape]["vocab_size"], (arguments.batch_size, arguments.length))
    times: dict[str, list[float]] = {way: [] for way in made}
    for turn in range(arguments.repeats + 1):
        for way, step in made.items():
            start = time.perf_counter()
            step(ids)
            if turn:  # the first warms up
                times[way].append(time.perf_counter() - start)
    medians = {way: statistics.median(seconds) for way, seconds in times.items()}
    lora = medians["LoRA (peft)"]
    print("| way | seconds a step | ÷ LoRA, of medians | ÷ LoRA, turn by turn |\n|---|---|---|---|")
    for way, median in medians.items():
        ratios = sorted(one / other for one, other in zip(times[way], times["LoRA (peft)"], strict=True))
        print(f"| {way} | {median:.2f} | {median / lora:.2f} | {ratios[0]:.2f} to {ratios[-1]:.2f} |")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions}
    print(json.dumps(vars(arguments) | machine | {"threads": torch.get_num_threads(), "seconds": times}))


if __name__ == "__main__":
    main()
