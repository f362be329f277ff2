"""What is in the file comes back as it was, and the limit is kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sqft.modeling.calibration.hidden_states import HiddenStates


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [0, 2, 5])
def test_states_come_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype, kept: int) -> None:
    states = [torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(5)]
    hidden = HiddenStates(kept * states[0].nbytes, tmp_path)
    for state in states:
        hidden.append(state)
    assert all(hidden[index].equal(state) and hidden[index].dtype == dtype for index, state in enumerate(states))
    for index in (4, 0, 3):
        hidden[index] = -states[index].transpose(0, 1).contiguous().transpose(0, 1)
    assert [index for index, state in enumerate(states) if hidden[index].equal(-state)] == [0, 3, 4]
    assert len(list(hidden)) == 5
    assert sum(hidden[index] is hidden[index] for index in range(5)) == kept  # the others are read anew each time
    assert not list(tmp_path.iterdir())  # nothing to clean up after a kill
