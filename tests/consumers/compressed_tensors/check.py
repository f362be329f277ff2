"""Does transformers, with compressed-tensors, compute sqft's logits from an exported folder? Run without sqft.

    python check.py FOLDER LOGITS.safetensors

LOGITS holds `ids` (int64 [n, tokens]) and the `logits` (float32 [n, tokens, vocabulary]) expected on them. Prints the
largest difference; exits with 1 when it is above TOLERANCE of the largest logit. Folders with zero points want
transformers 5.17.0, those with act-order compressed-tensors 0.18.0 besides.
"""

from __future__ import annotations

import importlib.util
import sys

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 1e-4
"""The model is opened in float32, where weights are equal to the bit and sums may come in another order."""


def main(folder: str, expected: str) -> int:
    assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to load the folder"
    given = load_file(expected)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(input_ids=given["ids"], use_cache=False).logits.float()
    difference = float((logits - given["logits"]).abs().max())
    largest = float(given["logits"].abs().max())
    print(f"largest difference {difference:.3g} of {largest:.3g}, tolerance {TOLERANCE * largest:.3g}")
    return 0 if difference <= TOLERANCE * largest else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
