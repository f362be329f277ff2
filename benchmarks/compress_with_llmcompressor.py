"""Prune a model folder with llm-compressor's Wanda, then quantize it with its GPTQ; run in llm-compressor's environment
by compression_speed.py.

    python compress_with_llmcompressor.py MODEL WINDOWS OUT GROUP_SIZE DAMP

Prints a line of JSON: the seconds of each, from the folder that is read to the one that is written.
"""

import json
import sys
import time
from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import WandaPruningModifier
from llmcompressor.modifiers.quantization import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

folder, windows, out, group_size, damp = sys.argv[1:]
rows = load_file(windows)["windows"]
text = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": rows.new_ones(rows.shape).tolist()})
codes = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=int(group_size))
scheme = QuantizationScheme(targets=["Linear"], weights=codes)


def seconds(modifier: Any, source: str, destination: str) -> float:
    start = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    how = {"num_calibration_samples": len(rows), "max_seq_length": rows.shape[1]}
    oneshot(model=model, tokenizer=folder, dataset=text, recipe=[modifier], **how)
    model.save_pretrained(destination)
    return time.perf_counter() - start


wanda = WandaPruningModifier(sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["lm_head"])
gptq = GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], dampening_frac=float(damp))
found = {"wanda": seconds(wanda, folder, f"{out}/sparse"), "gptq": seconds(gptq, f"{out}/sparse", f"{out}/codes")}
print(json.dumps(found))
