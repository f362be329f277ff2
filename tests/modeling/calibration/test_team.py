"""Two processes that share the calibration windows have the statistics, and the weights, that one has."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

from sqft.errors import StageError
from sqft.modeling.architecture.blocks import linears
from sqft.modeling.architecture.linears import as_linears
from sqft.modeling.calibration.statistics import InputStatistics
from sqft.modeling.calibration.team import Team
from sqft.modeling.calibration.walk import walk
from sqft.types import LinearStats, Statistic
from sqft.utils.progress import silent

BOTH = frozenset({Statistic.INPUT_NORM, Statistic.HESSIAN})
SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8,
}  # fmt: skip


def model_of(kind: str) -> PreTrainedModel:
    torch.manual_seed(0)
    experts = {"num_local_experts": 32, "num_experts_per_tok": 1}
    config = MixtralConfig(**SIZES, **experts) if kind == "mixture" else LlamaConfig(**SIZES)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    as_linears(model)
    return model


def walked(kind: str, team: Team, way: str) -> tuple[dict[str, LinearStats], dict[str, Tensor]]:
    """A walk that changes each layer by what it was given; what `compress` saw, and the weights after it.

    Seven windows, of which two processes have four and three; few tokens, so that some experts are reached in one
    process only, and some in none.
    """
    model = model_of(kind)
    windows = torch.randint(64, (7, 3), generator=torch.Generator().manual_seed(1))
    seen: dict[str, LinearStats] = {}

    def compress(name: str, linear: nn.Linear, stats: LinearStats) -> None:
        assert stats.input_sq_sum is not None
        seen[name] = stats
        linear.weight.data *= 0.5 + 0.5 * (stats.input_sq_sum > stats.input_sq_sum.median())

    walk(model, windows, set(linears(model)), BOTH, compress, "cpu", silent, True, way, team=team)
    return seen, {name: linear.weight.detach() for name, linear in linears(model).items()}


def join(rank: int, count: int, port: int) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)


def take_part(rank: int, port: int, folder: Path) -> None:
    join(rank, 2, port)
    found = {f"{kind} {way}": walked(kind, Team(rank, 2), way) for kind, way in WAYS}
    # Layers that share one sum in the first process only: nothing may be added twice.
    team, layers = Team(rank, 2), {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2), "c": nn.Linear(3, 2)}
    one, two, none = InputStatistics(BOTH), InputStatistics(BOTH), InputStatistics(BOTH)
    one.add(torch.full((2, 3), 1.0 + rank))
    two.add(torch.full((2, 3), 1.0 + rank))
    mixed = team.sum({"a": one, "b": two if rank else one, "c": none}, layers)
    try:
        team.assert_same(rank, "blocks")
    except StageError as error:
        found["error"] = error  # type: ignore[assignment]
    torch.save({"found": found, "mixed": mixed, "agreed": team.agreed(f"of {rank}")}, folder / f"{rank}.pt")
    distributed.destroy_process_group()


WAYS = [("dense", "blocks"), ("mixture", "blocks"), ("dense", "model")]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("team")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, str(port), str(folder)]
    started = [subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True) for rank in range(2)]
    for one in started:
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize(("kind", "way"), WAYS)
def test_two_processes_see_what_one_sees(both: list[dict[str, Any]], kind: str, way: str) -> None:
    alone, weights = walked(kind, Team(), way)
    (seen, own), (nothing, others) = (one["found"][f"{kind} {way}"] for one in both)
    assert seen.keys() == alone.keys() and not nothing
    for name, stats in alone.items():
        found = seen[name]
        assert (found.tokens, found.unreached) == (stats.tokens, stats.unreached)
        torch.testing.assert_close(found.input_sq_sum, stats.input_sq_sum)
        torch.testing.assert_close(found.hessian, stats.hessian)
    if kind == "mixture":
        reached = [name for name, stats in alone.items() if "experts" in name and not stats.unreached]
        assert 0 < len(reached) < sum("experts" in name for name in alone)
    for name, weight in weights.items():
        assert own[name].equal(others[name])
        torch.testing.assert_close(own[name], weight)


def test_a_sum_that_layers_share_in_one_process_only_is_not_added_twice(both: list[dict[str, Any]]) -> None:
    sums = both[0]["mixed"]
    assert [sums[name].tokens for name in "abc"] == [4, 4, 0]
    for name in "ab":  # two tokens of ones, and two of twos
        assert sums[name].hessian.equal(torch.full((3, 3), 10.0)) and sums[name].input_sq_sum.tolist() == [10, 10, 10]
    assert sums["c"].hessian.count_nonzero() == 0
    with pytest.raises(StageError, match="no token"):
        sums["c"].result("c")


def test_the_first_process_decides(both: list[dict[str, Any]]) -> None:
    assert [one["agreed"] for one in both] == ["of 0", "of 0"]
    assert "error" not in both[0]["found"]
    assert "process 1 sees other blocks than the first process" in str(both[1]["found"]["error"])


if __name__ == "__main__":
    take_part(int(sys.argv[3]), int(sys.argv[1]), Path(sys.argv[2]))
