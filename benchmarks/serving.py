"""Tokens a second of the programs that open one INT4 model on the CPU, each in an environment of its own.

    python benchmarks/serving.py FOLDER [--floats SPARSE] [--programs sqft gptqmodel llama.cpp] [--rounds 5]
        [--prompt 512] [--generated 64] [--threads 2] [--scratch DIR] [--json FILE]

FOLDER is a GPTQ checkpoint of 4 bits in symmetric groups, such as `merge` or `quantize` writes. --floats is a folder of
floats, the same model before it was quantized, for a row of transformers. Every round starts each program once, one
after the other; the table has medians over rounds, the smallest and largest in brackets, and the ratio to the first
row. Needs `make consumers`; the GGUF file and ONNX Runtime's model are made in --scratch and kept there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from sqft_gguf import Gguf

from sqft.modeling.loading.finished_model import FinishedModel
from sqft.utils.resources import versions

ROOT = Path(__file__).parents[1]
ENVIRONMENTS = {
    "gptqmodel": "gptqmodel",
    "llama.cpp": "llama_cpp",
    "ONNX Runtime GenAI": "onnxruntime_genai",
    "OpenVINO GenAI": "openvino",
}
PACKAGES = {
    "gptqmodel": "gptqmodel",
    "llama.cpp": "xllamacpp",
    "ONNX Runtime GenAI": "onnxruntime-genai",
    "OpenVINO GenAI": "openvino-genai",
}


def python_of(program: str) -> str:
    """Return the interpreter that runs a program."""
    if program not in ENVIRONMENTS:
        return sys.executable
    return str(ROOT / ".consumers" / ENVIRONMENTS[program] / "bin" / "python")


def version_of(program: str) -> str:
    """Return the version of the package that runs a program."""
    if program not in PACKAGES:
        return versions()["sqft" if program == "sqft" else "transformers"]
    code = f"from importlib.metadata import version; print(version({PACKAGES[program]!r}))"
    return subprocess.run([python_of(program), "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def as_gguf(folder: Path, place: Path) -> None:
    """Write the model as a GGUF file, its embeddings in float16."""
    Gguf(embeddings="float16").export(FinishedModel(folder), place)


def as_onnx(folder: Path, place: Path) -> None:
    """Let ONNX Runtime GenAI's model builder make its folder; embedding and head stay floats."""
    command = [python_of("ONNX Runtime GenAI"), "-m", "onnxruntime_genai.models.builder", "-i", str(folder)]
    command += ["-o", str(place), "-p", "int4", "-e", "cpu", "-c", str(place / "cache"), "--extra_options"]
    command += ["nodes_to_exclude=/lm_head/MatMul,/model/embed_tokens/Gather"]
    subprocess.run(command, check=True, capture_output=True)


def made(make: Callable[[Path, Path], None], folder: Path, scratch: Path) -> Path:
    """Return the folder that `make` makes of a model, made once for each model and complete."""
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.safetensors")))).hexdigest()
    place = scratch / f"{make.__name__}-{digest[:12]}"
    if not place.exists():
        partial = place.with_name(f"partial-{place.name}")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        make(folder, partial)
        partial.rename(place)
    return place


def measured(program: str, path: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Start a program once and return what it prints."""
    script = Path(__file__).with_name("serve_once.py")
    numbers = map(str, (arguments.prompt, arguments.generated, arguments.threads))
    command = [python_of(program), "-P", str(script), program, str(path), *numbers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} failed:\n{done.stderr[-2000:]}")
    (line,) = (line for line in done.stdout.splitlines() if line.startswith('{"prefill"'))  # the program may log too
    found: dict[str, float] = json.loads(line)
    return found


def cell(values: list[float], first: float) -> str:
    """Return a median, its ratio to the first row's, and the smallest and largest."""
    middle = statistics.median(values)
    return f"{middle:.4g} ({min(values):.4g} to {max(values):.4g}), {middle / first:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--floats", type=Path)
    parser.add_argument("--programs", nargs="+", choices=["sqft", *ENVIRONMENTS], default=["sqft", *ENVIRONMENTS])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--generated", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--scratch", type=Path, default=Path("store-serving"))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    paths = dict.fromkeys(arguments.programs, arguments.folder)
    if {"llama.cpp", "OpenVINO GenAI"} & paths.keys():
        gguf = made(as_gguf, arguments.folder, arguments.scratch) / "model.gguf"
        paths |= {program: gguf for program in paths if program in ("llama.cpp", "OpenVINO GenAI")}
    if "ONNX Runtime GenAI" in paths:
        paths["ONNX Runtime GenAI"] = made(as_onnx, arguments.folder, arguments.scratch)
    if arguments.floats:
        paths["transformers"] = arguments.floats
    found: dict[str, list[dict[str, float]]] = {program: [] for program in paths}
    for number in range(arguments.rounds):
        for program, path in paths.items():
            found[program].append(measured(program, path, arguments))
            print(f"round {number + 1}, {program}: {found[program][-1]}", file=sys.stderr, flush=True)
    columns = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s", "memory": "peak memory, MB"}
    print(f"| program | version | {' | '.join(columns.values())} |\n|---|---|---|---|---|")
    first = {name: statistics.median(one[name] for one in next(iter(found.values()))) for name in columns}
    for program, rounds in found.items():
        label = f"{program}, floats" if program == "transformers" else program
        cells = [cell([one[name] for one in rounds], first[name]) for name in columns]
        print(f"| {label} | {version_of(program)} | {' | '.join(cells)} |")
    if arguments.json:
        how = {name: getattr(arguments, name) for name in ("prompt", "generated", "threads", "rounds")}
        facts = {"machine": platform.platform(), "versions": versions(), "programs": list(map(version_of, found))}
        arguments.json.write_text(json.dumps(how | facts | {"found": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
