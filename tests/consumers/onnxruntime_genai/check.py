"""Does ONNX Runtime GenAI make of a GPTQ folder the model that sqft wrote, and say what it says? Run without sqft.

    python check.py FOLDER BUILT VALUES.safetensors GIVEN.json [OPTION=VALUE …]

Its model builder makes the folder BUILT, with these options. VALUES holds the weight of each quantized layer as floats.
GIVEN holds `prompts`, each with its `tokens` and the `logprobs` of the most likely next ones (by token id), the
`answers` that the model generates greedily after each of them (token ids), or none, and a `tolerance`. Prints how many
weights differ, the largest difference of a log probability, how many answers are equal, and tokens a second; exits with
1 when a weight differs, or a log probability by more than the tolerance.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime_genai as genai
from onnx import numpy_helper
from safetensors.numpy import load_file

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj")}


def main(folder: str, built: str, values: str, given: str, *options: str) -> int:
    assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to read the folder"
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", folder, "-o", built, "-p", "int4"]
    command += ["-e", "cpu", "-c", f"{built}-cache", *(["--extra_options", *options] if options else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    wanted = json.loads(Path(given).read_text("utf-8"))
    count, weights, differing = compare(load_file(values), built)
    print(f"{count} of the quantized layers found, {weights} weights, {differing} differ")
    largest, equal, speed = generate(built, wanted)
    print(
        f"largest difference {largest:.3g}, tolerance {wanted['tolerance']:.3g}; {equal} of {len(wanted['answers'])} "
        f"answers are equal; {speed:.1f} tokens a second"
    )
    return 0 if count and not differing and largest <= wanted["tolerance"] else 1


def compare(values: dict[str, Any], built: str) -> tuple[int, int, int]:
    """Return how many layers of `values` the built model has, of how many weights, and how many of these differ."""
    found = dict(layers(built, values))
    assert found.keys() == values.keys(), sorted(values.keys() ^ found.keys())
    differing = sum(int((found[name] != values[name]).sum()) for name in values)
    return len(found), sum(weight.size for weight in values.values()), differing


def layers(built: str, values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the weight of each quantized layer, [out, in] as floats, under its name in the checkpoint."""
    graph = onnx.load(f"{built}/model.onnx").graph
    stored = {one.name: one for one in graph.initializer}
    for node in graph.node:
        place = node.name.replace("/", ".").strip(".").removesuffix(".MatMulNBits").replace(".attn.", ".self_attn.")
        parent, _, name = place.rpartition(".")
        members = [f"{parent}.{member}" for member in FUSED.get(name, (name,))]
        if node.op_type != "MatMulNBits" or members[0] not in values:
            continue
        weight = unpacked(node, [numpy_helper.to_array(stored[name]) for name in node.input[1:] if name in stored])
        start = 0
        for member in members:
            rows = values[member].shape[0]
            yield member, weight[start : start + rows]
            start += rows


def unpacked(node: Any, inputs: list[Any]) -> Any:
    """Return what the codes of a MatMulNBits stand for, by its definition: (code - zero point) * scale."""
    settings = {a.name: a.i for a in node.attribute}
    rows, columns, size, bits = (settings[name] for name in ("N", "K", "block_size", "bits"))
    groups, per_byte = -(-columns // size), 8 // bits
    packed, scales, zeros = inputs[:3]
    shifts = numpy.arange(per_byte) * bits
    mask = (1 << bits) - 1
    codes = ((packed.reshape(rows, -1, 1) >> shifts) & mask).reshape(rows, groups * size)
    zeros = ((zeros.reshape(rows, -1, 1) >> shifts) & mask).reshape(rows, -1)[:, :groups]
    offsets = codes.reshape(rows, groups, size).astype(numpy.float32) - zeros[:, :, None]
    return (offsets * scales.reshape(rows, groups, 1).astype(numpy.float32)).reshape(rows, -1)[:, :columns]


def generate(built: str, wanted: dict[str, Any]) -> tuple[float, int, float]:
    """Return the largest difference of a log probability, how many answers are equal, and tokens a second."""
    model = genai.Model(built)
    largest, equal, tokens, spent = 0.0, 0, 0, 0.0
    for number, prompt in enumerate(wanted["prompts"]):
        answer = wanted["answers"][number] if wanted["answers"] else []
        parameters = genai.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt["tokens"]) + len(answer) + 1, do_sample=False)
        generator = genai.Generator(model, parameters)
        start = time.perf_counter()
        generator.append_tokens(prompt["tokens"])
        logits = numpy.asarray(generator.get_logits(), dtype=numpy.float64).reshape(-1)
        logprobs = logits - numpy.log(numpy.exp(logits - logits.max()).sum()) - logits.max()
        for token, expected in prompt["logprobs"].items():
            largest = max(largest, abs(float(logprobs[int(token)]) - expected))
        said = []
        while len(said) < len(answer) and not generator.is_done():
            generator.generate_next_token()
            said.append(int(generator.get_next_tokens()[0]))
        spent += time.perf_counter() - start
        tokens += len(prompt["tokens"]) + len(said)
        equal += bool(answer) and said == answer
    return largest, equal, tokens / spent


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
