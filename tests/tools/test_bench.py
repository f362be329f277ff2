"""`sqft bench` on a tiny model: facts against files, and the int4 kernel against dequantized weights."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from sqft_gptq.solver import round_to_nearest
from transformers import GPT2Config, GPT2LMHeadModel

from sqft.cli import main
from sqft.kernels.grids import dequantize, residual
from sqft.modeling.adapters.frozen_weight import INT4_ROWS, PackedWeight
from sqft.tools.bench import serve


def test_bench_compares_two_recipes(raw: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw["search"] = {}
    raw["evaluate"] = {"of": ["search"], "exact_match": raw["evaluate"]["exact_match"]}
    unmerged = json.loads(json.dumps(raw))
    unmerged["name"], unmerged["finetune"]["merger"] = "beside", "unmerged"
    unmerged.pop("merge")
    raw["name"] = "codes"
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    places = []
    for recipe in (unmerged, raw):
        places.append(tmp_path / f"{recipe['name']}.json")
        places[-1].write_text(json.dumps(recipe))
    store = tmp_path / "store"
    command = ["bench", *map(str, places), "--rounds", "1", "--steps", "2", "--store", str(store), "--json"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.stderr
    one, two = json.loads(done.stdout)
    assert (one["recipe"], one["mergeable"], one["precision"]) == ("beside", False, "float32 + float32")
    assert (two["recipe"], two["mergeable"], two["precision"]) == ("codes", True, "INT4")
    sizes = {}
    for what in ("sparsify", "search", "merge"):
        (folder,) = [f for f in (store / "artifacts").glob(f"{what}-*") if what != "search" or (f / "adapter" / "adapter_model.safetensors").exists()]  # fmt: skip  # noqa: E501
        sizes[what] = sum(f.stat().st_size for f in folder.glob("*/*.safetensors"))
    assert one["storage"] == sizes["sparsify"] + sizes["search"] and two["storage"] == sizes["merge"]
    assert two["kernel_layers"] == two["packed_layers"] == 14 and one["packed_layers"] == 0
    assert all(row[key] > 0 for row in (one, two) for key in ("steps_per_second", "prefill", "decode"))
    assert len(list((store / "artifacts").glob("finetune-*"))) == 2  # those of the measurements are gone
    monkeypatch.setattr("sqft.tools.bench.bench", lambda *_: [one, two])  # not measured a second time for the table
    shown = CliRunner().invoke(main, [*command[:-1]]).stdout.splitlines()
    assert len(shown) == 4 and shown[2].startswith("| beside | no | float32 + float32 |") and "(1.00)" in shown[2]


def test_measuring_takes_nothing_of_the_users_away(raw: dict[str, Any], tmp_path: Path) -> None:
    """Not even where the recipe itself is as short as a measurement."""
    from sqft import Orchestrator, Recipe, Registry
    from sqft.tools.bench import train

    raw["search"], raw["finetune"]["steps"] = {}, 3
    raw.pop("evaluate")
    place, store = tmp_path / "my recipe.json", tmp_path / "store"
    place.write_text(json.dumps(raw))
    orchestrator = Orchestrator(Registry.discover(), store)
    orchestrator.run(orchestrator.plan(Recipe.load(place)), "finetune")
    before = sorted(path.name for path in (store / "artifacts").iterdir())
    assert train(place, [], store, 3)["steps_per_second"] > 0
    assert sorted(path.name for path in (store / "artifacts").iterdir()) == before


def test_a_recipe_that_trains_nothing(raw: dict[str, Any], tmp_path: Path) -> None:
    for section in ("finetune", "search", "merge", "evaluate"):
        raw.pop(section)
    (tmp_path / "r.json").write_text(json.dumps(raw))
    done = CliRunner().invoke(main, ["bench", str(tmp_path / "r.json"), "--store", str(tmp_path / "s")])
    assert done.exit_code == 2 and "fine-tunes nothing" in done.stderr


def test_what_could_be_merged_and_is_not(raw: dict[str, Any], tmp_path: Path) -> None:
    raw.pop("merge")
    raw.pop("evaluate")
    (tmp_path / "r.json").write_text(json.dumps(raw))
    done = CliRunner().invoke(main, ["bench", str(tmp_path / "r.json"), "--store", str(tmp_path / "s")])
    assert done.exit_code == 2 and 'add "merge": {}' in done.stderr and not (tmp_path / "s" / "artifacts").exists()


def test_a_window_shorter_than_the_prompt(raw: dict[str, Any], tmp_path: Path, tokenizer: Any) -> None:
    """Learned positions end where the window does."""
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    raw["model"]["path"], raw["search"] = str(tmp_path / "gpt2"), {}
    raw["calibration"]["length"], raw["finetune"]["max_length"], raw["finetune"]["targets"] = 32, 48, ["*"]
    raw.pop("evaluate")
    place = tmp_path / "r.json"
    place.write_text(json.dumps(raw))
    assert serve(place, [], tmp_path / "store")["prefill"] > 0


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_int4_kernel_is_the_dequantized_weight(symmetric: bool) -> None:
    """To bfloat16's rounding of scales and of the result; with more rows it is the floats' own matmul."""
    g = torch.Generator().manual_seed(0)
    quantized = round_to_nearest(torch.randn(32, 128, generator=g), None, 4, 32, symmetric, False)
    weight = PackedWeight(quantized, None, torch.bfloat16)
    assert weight.prepare_int4_kernel()
    for rows in (1, INT4_ROWS, INT4_ROWS + 1):
        x = torch.randn(rows, 128, generator=g).bfloat16()
        exact = x.double() @ dequantize(quantized).double().T
        with torch.no_grad():
            y = weight.linear(x, None)
        assert (y.double() - exact).abs().max() <= 0.01 * exact.abs().max()
        if rows > INT4_ROWS:
            assert y.equal(F.linear(x, dequantize(quantized).bfloat16()))
    weight.set_residual(residual(quantized))  # it is no longer the codes' value, which the kernel would give
    with torch.no_grad():
        assert weight.linear(x[:1], None).equal(F.linear(x[:1], dequantize(quantized, residual(quantized)).bfloat16()))
    assert not weight.prepare_int4_kernel()
    part = round_to_nearest(torch.randn(32, 96, generator=g), None, 4, 32, symmetric, False)
    part = replace(part, grid=replace(part.grid, group_size=64))  # of somebody else's, whose last group is short
    assert not PackedWeight(part, None, torch.bfloat16).prepare_int4_kernel()
    odd = round_to_nearest(torch.randn(32, 128, generator=g), None, 8, 32, symmetric, False)
    assert not PackedWeight(odd, None, torch.bfloat16).prepare_int4_kernel()
