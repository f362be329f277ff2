"""The bridge's quantizer through the contract suite, and its codes against sqft's; prints the share that is equal."""

import torch
from sqft_gptq import Gptq
from sqft_gptqmodel import GptqModel

from sqft.api import LinearStats
from sqft.testing import check_quantizer

for options in ({}, {"symmetric": False}, {"act_order": True}, {"reorder_groups": True}, {"bits": 8}):
    check_quantizer(GptqModel(group_size=32, **options))
g = torch.Generator().manual_seed(0)
weight = torch.randn(48, 128, generator=g)
inputs = torch.randn(2000, 128, generator=g) @ (torch.eye(128) + 0.1 * torch.randn(128, 128, generator=g))
stats = LinearStats(2000, None, inputs.T @ inputs)
theirs = GptqModel(group_size=-1, damp=0.05).quantize(weight, None, stats)
ours = Gptq(group_size=-1, damp=0.05, reorder_groups=False).quantize(weight, None, stats)
print((theirs.codes == ours.codes).float().mean().item())
