"""Load a GPTQ folder with transformers and gptqmodel, where sqft is not installed, and compare logits.

    python check.py FOLDER GIVEN

GIVEN is a safetensors file of `ids` [1, tokens] int64 and `logits` [1, tokens, vocabulary] float32, of the float model
that the codes stand for. gptqmodel's CPU kernel computes in bfloat16 where all else is float32: hence the tolerance.
"""

import importlib.util
import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

TOLERANCE = 0.03  # of the largest logit

assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to load the folder"
folder, given = sys.argv[1:]
wanted = load_file(given)
model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=torch.float32)
kernels = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight") or hasattr(module, "bits")}
with torch.no_grad():
    logits = model(wanted["ids"]).logits.float()
off = float((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max())
agree = float((logits.argmax(-1) == wanted["logits"].argmax(-1)).float().mean())
print(f"kernels {sorted(kernels)}; largest difference {off:.4f} of the largest logit; same token at {agree:.1%}")
assert kernels, "no layer was loaded as codes"
sys.exit(not off <= TOLERANCE)
