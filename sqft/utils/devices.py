"""The choice of one GPU, made before torch looks at them."""

from __future__ import annotations

import os

from sqft.errors import DeviceError


def expose_one_gpu(device: str) -> str:
    """Hide all GPUs but the one that `device` names, and return the name that it then has.

    Sets CUDA_VISIBLE_DEVICES, so it must run before torch is initialised: Trainer would use every GPU it sees. In
    one of several processes, plain "cuda" means the GPU whose number is the process's own (LOCAL_RANK).

    Raises:
        DeviceError: when the name is not cuda or cuda:N, or CUDA_VISIBLE_DEVICES already hides that GPU.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return device
    index = index or os.environ.get("LOCAL_RANK", "")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = visible.split(",") if visible is not None else None
    number = int(index) if index.isdecimal() else 0
    if index and not index.isdecimal():
        raise DeviceError(f"--device {device}: write cuda or cuda:N")
    if shown is not None and number >= len(shown):
        raise DeviceError(f"--device {device}: CUDA_VISIBLE_DEVICES shows {len(shown)} device(s)")
    os.environ["CUDA_VISIBLE_DEVICES"] = shown[number] if shown else index or "0"
    return "cuda"
