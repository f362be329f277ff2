"""The one GPU that is shown to torch."""

from __future__ import annotations

import os

import pytest

from sqft.errors import DeviceError
from sqft.utils.devices import expose_one_gpu


@pytest.mark.parametrize(
    ("device", "visible", "local_rank", "name", "exposed"),
    [
        ("cpu", None, None, "cpu", None),
        ("cuda", None, None, "cuda", "0"),
        ("cuda:3", None, None, "cuda", "3"),
        ("cuda:1", "4,7", None, "cuda", "7"),
        ("cuda", "4,7", None, "cuda", "4"),
        ("cuda", "4,7", "1", "cuda", "7"),  # of several processes, each has its own
        ("mps", "4,7", None, "mps", "4,7"),
    ],
)
def test_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch,
    device: str, visible: str | None, local_rank: str | None, name: str, exposed: str | None,
) -> None:  # fmt: skip
    for variable, value in (("CUDA_VISIBLE_DEVICES", visible), ("LOCAL_RANK", local_rank)):
        monkeypatch.setenv(variable, value or "")
        if value is None:
            monkeypatch.delenv(variable)
    assert expose_one_gpu(device) == name
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == exposed


@pytest.mark.parametrize(
    ("device", "message"),
    [("cuda:one", "write cuda or cuda:N"), ("cuda:2", r"CUDA_VISIBLE_DEVICES shows 2 device\(s\)")],
)
def test_one_that_cannot_be_meant(monkeypatch: pytest.MonkeyPatch, device: str, message: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    with pytest.raises(DeviceError, match=message):
        expose_one_gpu(device)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,7"
