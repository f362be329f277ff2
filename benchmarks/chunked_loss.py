"""Peak memory and time of one training step with the logits all at once and in chunks (`finetune.loss_chunk`).

    python benchmarks/chunked_loss.py [--rounds 3] [--chunk 128] [--vocabularies 49152 151936] [--as-is]

The model has SmolLM2-135M's width and 6 layers. Its query projections are trained, the head is frozen, and every token
has a label. Each measurement runs in a separate process. The two ways take turns, and medians are printed. Memory is
the process's memory as the system sees it. glibc is set to return freed memory: its heap would otherwise keep holes
as large as the chunks; with --as-is it is not.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sqft.modeling.training.loss import CompletionLoss
from sqft.utils.resources import peak_memory

MIB = 1 << 20


def measure(vocabulary: int, chunk: int | None, rows: int, length: int) -> dict[str, float]:
    """Measure one step after a warm-up step: the peak above the memory held before, the seconds, and the loss."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=576, intermediate_size=1536, num_hidden_layers=6, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
    loss = CompletionLoss(model, chunk)
    ids = torch.randint(vocabulary, (rows, length))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    few = {name: value[:1, :16] for name, value in batch.items()}
    loss(**few)["loss"].backward()
    with peak_memory() as before:
        pass
    start = time.perf_counter()
    with peak_memory() as peak:
        value = loss(**batch)["loss"]
        value.backward()
    return {"memory": peak[0] - before[0], "seconds": time.perf_counter() - start, "loss": value.item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--vocabularies", type=int, nargs="+", default=[49152, 151936])
    parser.add_argument("--as-is", action="store_true")
    parser.add_argument("--one", type=int, nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        vocabulary, chunk, rows, length = arguments.one
        print(json.dumps(measure(vocabulary, chunk or None, rows, length)))
        return
    environment = os.environ | ({} if arguments.as_is else {"MALLOC_MMAP_THRESHOLD_": "65536"})
    print("| vocabulary | logits | peak of a step, MiB | seconds | loss |\n|---|---|---|---|---|")
    for vocabulary in arguments.vocabularies:
        found: dict[int, list[dict[str, float]]] = {0: [], arguments.chunk: []}
        for _ in range(arguments.rounds):
            for chunk, measured in found.items():
                words = map(str, (vocabulary, chunk, arguments.rows, arguments.length))
                command = [sys.executable, "-P", __file__, "--one", *words]
                done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
                measured.append(json.loads(done.stdout.splitlines()[-1]))
        for chunk, measured in found.items():
            memory, seconds, loss = (statistics.median(m[k] for m in measured) for k in ("memory", "seconds", "loss"))
            way = f"{chunk} labels at a time" if chunk else "all at once"
            print(f"| {vocabulary:,} | {way} | {memory / MIB:,.0f} | {seconds:.2f} | {loss:.5f} |", flush=True)


if __name__ == "__main__":
    main()
