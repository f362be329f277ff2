"""Does mlx_lm make of a folder the model that sqft wrote, and say what it says? Run without sqft.

    python check.py FOLDER VALUES.safetensors GIVEN.json

VALUES holds the weight of each quantized layer as floats. GIVEN holds `prompts`, each with its `tokens` and the
`logprobs` of the most likely next ones (by token id), the `answers` that the model generates greedily after each of
them (token ids), and a `tolerance`. Prints how many layers differ, how many zeros MLX's own arithmetic loses, the
largest difference of a log probability, and how many answers are equal; exits with 1 when a layer differs, a zero is
lost or the difference is above the tolerance.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm


def main(folder: str, values: str, given: str) -> int:
    assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to open the folder"
    wanted = json.loads(Path(given).read_text("utf-8"))
    model, tokenizer = mlx_lm.load(folder)
    layers = {name: one for name, one in model.named_modules() if isinstance(one, nn.QuantizedLinear)}
    expected = mx.load(values)
    assert layers.keys() == expected.keys(), sorted(layers.keys() ^ expected.keys())
    differ = sum(not mx.array_equal(value(layers[name], mx.float32), expected[name]) for name in layers)
    lost = sum(
        int(((value(layer, layer.scales.dtype) != 0) & (expected[name] == 0)).sum()) for name, layer in layers.items()
    )
    print(f"{len(layers)} quantized layers, {differ} differ; {lost} zeros are lost")
    largest, equal = 0.0, 0
    for prompt, answer in zip(wanted["prompts"], wanted["answers"], strict=True):
        logits = model(mx.array([prompt["tokens"]]))[0, -1].astype(mx.float32)
        logprobs = logits - mx.logsumexp(logits)
        for token, one in prompt["logprobs"].items():
            largest = max(largest, abs(float(logprobs[int(token)]) - one))
        equal += said(model, tokenizer, prompt["tokens"], len(answer)) == answer
    tolerance = wanted["tolerance"]
    print(f"largest difference {largest:.3g}, tolerance {tolerance:.3g}")
    print(f"{equal} of {len(wanted['answers'])} answers are equal")
    return 0 if not differ and not lost and largest <= tolerance else 1


def value(layer: Any, dtype: Any) -> Any:
    """Return the weight that a layer's codes stand for, by MLX's arithmetic in `dtype`."""
    scales, biases = layer.scales.astype(dtype), layer.biases.astype(dtype)
    return mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits).astype(mx.float32)


def said(model: Any, tokenizer: Any, tokens: list[int], number: int) -> list[int]:
    """Return the tokens that follow, up to an end of text."""
    found = [one.token for one in mlx_lm.stream_generate(model, tokenizer, mx.array(tokens), max_tokens=number)]
    return found[:number]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
