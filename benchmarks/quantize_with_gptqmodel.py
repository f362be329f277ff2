"""Quantize a model folder with gptqmodel's own GPTQ; run in gptqmodel's environment by gptq_against_gptqmodel.py.

python quantize_with_gptqmodel.py MODEL WINDOWS OUT BITS GROUP_SIZE DAMP DESC_ACT REORDER

Prints a line of JSON: the seconds from the folder that is read to the one that is written.
"""

import json
import os
import sys
import time

os.environ.setdefault(
    "GPTQMODEL_CPU_WORKERS", "2"
)  # on two cores its default is one, which is too few for gptqmodel itself

from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file

folder, windows, out, bits, group_size, damp, desc_act, reorder = sys.argv[1:]
config = QuantizeConfig(
    bits=int(bits),
    group_size=int(group_size),
    sym=True,
    damp_percent=float(damp),
    desc_act=desc_act == "1",
    act_group_aware=reorder == "1",
    device="cpu",
)
start = time.perf_counter()
model = GPTQModel.load(folder, config)
calibration = [{"input_ids": row, "attention_mask": row.new_ones(len(row))} for row in load_file(windows)["windows"]]
model.quantize(calibration, batch_size=1)
model.save(out)
print(json.dumps({"gptq": time.perf_counter() - start}))
