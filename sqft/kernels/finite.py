"""Whether all numbers of a tensor are finite."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether a tensor holds neither NaN nor infinity, in one pass."""
    if tensor.numel() == 0 or not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    if tensor.is_complex():  # as the frequencies of some towers' positions are
        tensor = torch.view_as_real(tensor.resolve_conj())
    if tensor.element_size() == 1:
        tensor = tensor.float()  # torch has no extremes of eight bits
    least, most = tensor.aminmax()  # NaN if any is
    return bool(least.isfinite() and most.isfinite())
