"""Sums and digests over a tensor's bits."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def bit_sum(tensor: Tensor) -> int:
    """A sum over the bits of a tensor of any type, modulo 2**64, at the speed of reading it."""
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if octets.storage_offset() % 8:  # words begin at multiples of their size
        octets = octets.clone()
    whole = len(octets) // 8 * 8
    return int(octets[:whole].view(torch.int64).sum()) + int(octets[whole:].sum(dtype=torch.int64))


def sha256(*tensors: Tensor) -> str:
    """Return the SHA-256 over type, shape and bits of these tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
