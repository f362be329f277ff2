"""Load a GPTQ folder with transformers and gptqmodel, where sqft is not installed, and compare logits.

    python check.py FOLDER GIVEN

GIVEN is a safetensors file of `ids` [1, tokens] int64 and `logits` [1, tokens, vocabulary] float32, of the float model
that the codes stand for. The kernel that gptqmodel chooses computes in bfloat16; its plain torch one hardly rounds.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPTQConfig

assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to load the folder"
folder, given = sys.argv[1:]
wanted = load_file(given)
bits = json.loads(Path(folder, "config.json").read_text())["quantization_config"]["bits"]
wrong = False
for label, settings, tolerance in (("its choice", {}, 0.05), ("torch", {"backend": "torch"}, 0.005)):
    how = {"quantization_config": GPTQConfig(bits=bits, **settings)} if settings else {}
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32, **how)
    kernels = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    kernels |= {type(module).__name__ for module in model.modules() if hasattr(module, "bits")}
    assert kernels, "no layer was loaded as codes"
    with torch.no_grad():
        logits = model(wanted["ids"]).logits.float()
    off = float((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max())
    print(f"{label}, {sorted(kernels)}: largest difference {off:.4f} of the largest logit; tolerance {tolerance}")
    wrong |= not off <= tolerance
sys.exit(wrong)
