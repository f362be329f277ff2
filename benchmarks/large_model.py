"""What it takes to compress a model that does not fit into memory: peak memory, seconds and bytes of each step.

    python benchmarks/large_model.py [--shape 8b] [--blocks 32] [--samples 4] [--length 64] [--until sparsify]
        [--work large]
    python benchmarks/large_model.py --merge floats [--shape 8b] [--blocks 32] [--work large]
    python benchmarks/large_model.py --train packed [--shape 8b] [--blocks 32] [--steps 2] [--batch-size 4]
        [--max-length 128] [--work large]

Makes a model of Llama 3's shape with random weights in bfloat16, in shards, once (8b: 16 GB on disk); then 50 % by
wanda, and INT4 by gptq in groups of 128. With --merge, an NLS adapter of random values is cut to the heuristic's ranks
(a search that evaluates nothing) and merged into the dense model instead, or into the codes that rtn makes of it: no
training is needed. With --train, adapters are trained on that sparse model, with gradient checkpointing and a chunked
loss, on text that fills every example: LoRA beside it, SparsePEFT on its floats or on them without zeros, or
QA-SparsePEFT on codes of rtn alone. Kill it, and start it again: it goes on at the next block. Needs the model of
`make quickstart`, for its tokenizer, and its data.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.model_spec import ModelSpec
from sqft.components.kinds import Adapter
from sqft.modeling.architecture.blocks import linears, shape_of
from sqft.modeling.loading import load_tokenizer
from sqft.modeling.loading.parts import PartedModel
from sqft.planning.plan import Plan
from sqft.stages.adapted import make_deltas
from sqft.stages.inputs import StageInputs
from sqft.stages.merge import MergeStage
from sqft.stages.search import SearchStage
from sqft.utils.files import write_json
from sqft.utils.resources import peak_memory
from sqft.utils.text import human_size

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / ".models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
TEXT = ROOT / "examples" / "quickstart" / "data" / "calibration.jsonl"
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32, "num_key_value_heads": 8},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
}
BLOCKS = {"1b": 16, "8b": 32}


def make_model(folder: Path, shape: str, blocks: int) -> None:
    """Write the model, a file for each block; the folder is complete once it has its index."""
    tied = shape == "1b"
    config = LlamaConfig(
        vocab_size=128256,
        num_hidden_layers=blocks,
        rope_theta=500000.0,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
        **SHAPES[shape],
    )
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    load_tokenizer(ModelSpec(TOKENIZER)).save_pretrained(folder)
    hidden, inner = config.hidden_size, config.intermediate_size
    keys = hidden * config.num_key_value_heads // config.num_attention_heads
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    head = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    head |= {} if tied else {"lm_head.weight": (config.vocab_size, hidden)}
    files = [{f"model.layers.{i}.{name}.weight": size for name, size in block.items()} for i in range(blocks)]
    norms = [[f"model.layers.{i}.{n}_layernorm.weight" for n in ("input", "post_attention")] for i in range(blocks)]
    file_of: dict[str, str] = {}
    for number, (sizes, ones) in enumerate([*zip(files, norms, strict=True), (head, ["model.norm.weight"])]):
        generator = torch.Generator().manual_seed(number)
        tensors = {
            n: torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for n, s in sizes.items()
        }
        tensors |= {name: torch.ones(hidden, dtype=torch.bfloat16) for name in ones}
        file = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(tensors, file)
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": file_of})


def merge(model: dict[str, Any], work: Path, codes: bool) -> None:
    """Search and merge an adapter of random values, in the stages themselves, and print what that took."""
    raw = {
        "name": "large",
        "model": model,
        "finetune": {
            "adapter": {"name": "nls", "options": {"ranks": [32, 24, 16], "alpha": 64}},
            "merger": "qa-sparsepeft" if codes else "sparsepeft",
            "targets": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"],
            "data": str(TEXT.with_name("train.jsonl")),
            "steps": 1,
        },
        "merge": {},
    }
    if codes:
        raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"bits": 4, "group_size": 128}}}
    orchestrator = Orchestrator(Registry.discover(), work / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    base = {"base": orchestrator.run(plan, "quantize")["quantize"].folder} if codes else {}
    trained = work / "trained"
    trained.mkdir(exist_ok=True)
    step, shapes = plan.step("finetune"), linears(PartedModel(plan.model_spec).model)
    adapter = step.component(Adapter)
    space, deltas = make_deltas(adapter, "nls", tuple(shape_of(n, shapes[n]) for n in step.layers), 0)
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{name}.{key}": torch.randn(tensor.shape, generator=generator).mul_(0.01)
        for name, delta in deltas.items()
        for key, tensor in delta.state_dict().items()  # type: ignore[attr-defined]
    }
    save_file(tensors, trained / "deltas.safetensors")
    write_json(trained / "space.json", asdict(space))
    del tensors, deltas
    print("| step | estimated | peak | seconds | verified in | on disk |\n|---|---|---|---|---|---|")
    folders = {**base, "finetune": trained}
    _measure(plan, "search", SearchStage, folders, work / "searched")
    _measure(plan, "merge", MergeStage, {**folders, "search": work / "searched"}, work / "merged")


def _measure(
    plan: Plan, name: str, stage: type[SearchStage] | type[MergeStage], folders: dict[str, Path], scratch: Path
) -> None:
    """Run a step in its own folder, and print what that took."""
    scratch.mkdir(exist_ok=True)
    step = plan.step(name)
    with peak_memory() as peak:
        start = time.monotonic()
        running = stage(StageInputs(plan, step, folders, scratch, "cpu"))
        running.run()
        made = time.monotonic()
        running.verify()
        seconds = made - start, time.monotonic() - made
    sizes = [human_size(size) for size in (step.estimate.memory, peak[0])]
    written = sum(file.stat().st_size for file in scratch.rglob("*") if file.is_file())
    print(
        f"| {name} | {' | '.join(sizes)} | {seconds[0]:.0f} s | {seconds[1]:.0f} s | {human_size(written)} |",
        flush=True,
    )


def training(way: str, steps: int, batch_size: int, max_length: int) -> dict[str, Any]:
    """Return the sections of a recipe that trains adapters on a sparse base, after those that make it."""
    nls = {"name": "nls", "options": {"ranks": [32, 24, 16], "alpha": 64}}
    finetune: dict[str, Any] = {
        "adapter": {"name": "lora", "options": {"rank": 32, "alpha": 64}} if way == "lora" else nls,
        "merger": {"lora": "unmerged", "codes": "qa-sparsepeft"}.get(way, "sparsepeft"),
        "base": "floats" if way == "lora" else way,
        "data": str(TEXT),
        "steps": steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "gradient_checkpointing": True,
        "loss_chunk": 64,
    }
    made: dict[str, Any] = {"finetune": finetune}
    if way == "codes":
        made["quantize"] = {"quantizer": {"name": "rtn", "options": {"bits": 4, "group_size": 128}}}
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--blocks", type=int, help="of the model; unless given, as many as Llama 3 has")
    parser.add_argument("--samples", type=int, default=4, help="calibration windows")
    parser.add_argument("--length", type=int, default=64, help="tokens in each")
    parser.add_argument("--merge", choices=["floats", "codes"], help="only merge an adapter, into a base of these")
    parser.add_argument("--train", choices=["lora", "floats", "packed", "codes"], help="train on a sparse base so")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128, help="tokens in an example")
    parser.add_argument("--until", choices=["sparsify", "quantize"], default="quantize")
    parser.add_argument("--work", type=Path, default=Path("large"))
    arguments = parser.parse_args()
    blocks = arguments.blocks or BLOCKS[arguments.shape]
    folder = arguments.work / f"{arguments.shape}-{blocks}"
    if not (folder / "model.safetensors.index.json").is_file():
        make_model(folder, arguments.shape, blocks)
    model = {"path": str(folder.absolute()), "dtype": "bfloat16"}
    if arguments.merge:
        merge(model, arguments.work, arguments.merge == "codes")
        return
    raw: dict[str, Any] = {
        "name": "large",
        "model": model,
        "calibration": {"data": str(TEXT), "samples": arguments.samples, "length": arguments.length},
        "sparsify": {"scorer": "wanda", "sparsity": 0.5},
    }
    if arguments.train:
        raw |= training(arguments.train, arguments.steps, arguments.batch_size, arguments.max_length)
    elif arguments.until == "quantize":
        gptq = {"name": "gptq", "options": {"bits": 4, "group_size": 128}}
        raw["quantize"] = {"quantizer": gptq, "keep_compensated": False}
    orchestrator = Orchestrator(Registry.discover(), arguments.work / "store")
    plan = orchestrator.plan(Recipe.parse(raw))
    run = orchestrator.run(plan)
    print("| step | estimated | peak | seconds | verified in | on disk |\n|---|---|---|---|---|---|")
    for name, outcome in run.items():
        manifest = outcome.artifact.manifest
        sizes = [human_size(size) for size in (plan.step(name).estimate.memory, manifest["peak_memory"])]
        seconds = [f"{manifest[key]:.0f} s" for key in ("seconds", "verify_seconds")]
        print(f"| {name} | {' | '.join([*sizes, *seconds])} | {human_size(outcome.artifact.size)} |")
    if arguments.train:
        print(f"a step: {run['finetune'].report['step_seconds']:.1f} s")


if __name__ == "__main__":
    main()
