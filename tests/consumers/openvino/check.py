"""Does OpenVINO GenAI make of a GGUF file the model that sqft wrote, and say what it says? Run without sqft.

    python check.py FOLDER VALUES.safetensors GIVEN.json

FOLDER holds model.gguf; OpenVINO's own model is written beside it. VALUES holds the weight of each quantized layer as
floats. GIVEN holds `prompts`, each with its `tokens`, and the `answers` that the model generates greedily after each of
them (token ids). Prints how many layers differ, how many answers are equal, and tokens a second; exits with 1 when a
layer differs.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy
import openvino
import openvino_genai
from safetensors.numpy import load_file


def main(folder: str, values: str, given: str) -> int:
    assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to read the file"
    wanted = json.loads(Path(given).read_text("utf-8"))
    # What it chooses depends on the processor: bfloat16 arithmetic, or 8 bits for activations, keys and values, change
    # some answers.
    how = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
    pipeline = openvino_genai.LLMPipeline(f"{folder}/model.gguf", "CPU", enable_save_ov_model=True, **how)
    settings = openvino_genai.GenerationConfig()
    settings.do_sample, settings.apply_chat_template, settings.ignore_eos = False, False, True
    equal, tokens, start = 0, 0, time.perf_counter()
    for prompt, answer in zip(wanted["prompts"], wanted["answers"], strict=True):
        settings.max_new_tokens = len(answer)
        ids = numpy.array([prompt["tokens"]], dtype=numpy.int64)
        inputs = openvino_genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(numpy.ones_like(ids)))
        equal += list(pipeline.generate(inputs, settings).tokens[0])[-len(answer) :] == answer
        tokens += ids.size + len(answer)
    speed = tokens / (time.perf_counter() - start)
    expected = Counter(row_set(weight) for weight in load_file(values).values())
    found = Counter(map(row_set, weights(f"{folder}/openvino_model.xml")))
    missing = sum((expected - found).values())
    print(f"{sum(expected.values())} quantized layers, {missing} differ")
    print(f"{equal} of {len(wanted['answers'])} answers are equal; {speed:.1f} tokens a second")
    return 1 if missing else 0


def row_set(weight: Any) -> tuple[tuple[int, ...], bytes]:
    """Return what a weight holds whatever the order of its rows: GGUF has its own for queries and keys."""
    rows = sorted(row.tobytes() for row in numpy.ascontiguousarray(weight, dtype=numpy.float32) + 0.0)  # no −0
    return weight.shape, b"".join(rows)


def weights(model: str) -> list[Any]:
    """Return what the codes of each matmul stand for: (code − zero point) · scale, [out, in]."""
    found = []
    for node in openvino.Core().read_model(model).get_ops():
        if node.get_type_name() != "MatMul":
            continue
        above = source(node.input(1))
        while above.get_type_name() in ("Convert", "Reshape"):
            above = source(above.input(0))
        if above.get_type_name() == "Multiply" and source(above.input(0)).get_type_name() == "Subtract":
            subtract = source(above.input(0))
            codes, zeros = (source(source(part).input(0)) for part in subtract.inputs())
            scale = source(above.input(1))
            value = (unpacked(codes) - unpacked(zeros)) * scale.data.astype(numpy.float32)
            found.append(value.reshape(value.shape[0], -1))
    return found


def source(part: Any) -> Any:
    return part.get_source_output().get_node()


def unpacked(constant: Any) -> Any:
    """Return a constant of 4 or 8 bits as floats, in its own shape."""
    kind, shape = constant.get_element_type().get_type_name(), list(constant.shape)
    data = numpy.asarray(constant.data)
    if kind == "u4" and data.size != numpy.prod(shape):
        data = data.reshape(-1).view(numpy.uint8)
        data = numpy.stack([data & 15, data >> 4], axis=-1).reshape(-1)[: int(numpy.prod(shape))]
    return data.reshape(shape).astype(numpy.float32)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
