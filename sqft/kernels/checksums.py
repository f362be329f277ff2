"""Checksums over the bits of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def bit_sum(tensor: Tensor) -> int:
    """Return a sum over the bits of a tensor of any type, modulo 2**64, at the speed of reading it.

    One changed bit always changes it; several can cancel out.
    """
    octets = tensor.detach().contiguous().reshape(-1).view(torch.uint8)  # [bytes]
    if octets.storage_offset() % 8:  # int64 words need an aligned address
        octets = octets.clone()
    words = len(octets) // 8 * 8
    return int(octets[:words].view(torch.int64).sum()) + int(octets[words:].sum(dtype=torch.int64))


def sha256(*tensors: Tensor) -> str:
    """Return the SHA-256 over type, shape and bits of these tensors."""
    total = hashlib.sha256()
    for tensor in tensors:
        total.update(f"{tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()
