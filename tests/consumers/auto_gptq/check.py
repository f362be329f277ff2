"""Load a GPTQ folder with auto-gptq, where sqft is not installed, and compare logits.

    python check.py FOLDER GIVEN

GIVEN is a safetensors file of `ids` [1, tokens] int64 and `logits` [1, tokens, vocabulary] float32, of the float model
that the codes stand for. auto-gptq computes in float32 here.
"""

import importlib.util
import sys

import torch
from auto_gptq import AutoGPTQForCausalLM
from safetensors.torch import load_file

TOLERANCE = 1e-4  # of the largest logit

assert importlib.util.find_spec("sqft") is None, "sqft must not be here: another program is to load the folder"
folder, given = sys.argv[1:]
wanted = load_file(given)
model = AutoGPTQForCausalLM.from_quantized(
    folder,
    device="cpu",
    use_safetensors=True,
    use_triton=False,
    disable_exllama=True,
    disable_exllamav2=True,
    torch_dtype=torch.float32,
    inject_fused_attention=False,
    inject_fused_mlp=False,
    low_cpu_mem_usage=False,
)
with torch.no_grad():
    logits = model(wanted["ids"]).logits.float()
off = float((logits - wanted["logits"]).abs().max() / wanted["logits"].abs().max())
print(f"largest difference {off:.2e} of the largest logit")
sys.exit(not off <= TOLERANCE)
