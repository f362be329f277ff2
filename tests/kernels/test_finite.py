"""One number that is not finite is found, wherever it is."""

from __future__ import annotations

import pytest
import torch

from sqft.kernels.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite(dtype: torch.dtype) -> None:
    tensor = torch.randn(7, 33, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert all_finite(tensor) and all_finite(tensor.T) and all_finite(torch.empty(0, 3, dtype=dtype))
    assert all_finite(tensor.to(torch.float8_e4m3fn)) and not all_finite(
        torch.tensor([float("nan")]).to(torch.float8_e4m3fn)
    )
    assert all_finite(torch.tensor(torch.finfo(dtype).max, dtype=dtype))
    assert (
        all_finite(torch.arange(3))
        and all_finite(torch.tensor([1], dtype=torch.uint16))
        and all_finite(torch.tensor([True, False]))
    )
    assert all_finite(torch.ones(2, dtype=torch.complex64)) and not all_finite(torch.tensor([1 + 0j, complex("nanj")]))
    for value in ("nan", "inf", "-inf"):
        for place in (0, 100, -1):
            wrong = tensor.clone()
            wrong.view(-1)[place] = float(value)
            assert not all_finite(wrong)
