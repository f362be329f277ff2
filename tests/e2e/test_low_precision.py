"""GPTQ on the real model: better than rounding layer by layer, zeros kept, and little lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sqft import Orchestrator, Recipe, Registry, Run
from sqft.checkpoints.model_spec import ModelSpec
from sqft.kernels.masks import unpack_mask

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "examples" / "recipes" / "gptq.json"
SHARED = ["sparsify.updater=least-squares", "quantize.quantizer.options.symmetric=true"]
"""The quickstart's sparse model and the codes of `test_consumers.py`, which ./store has already."""


@pytest.fixture(scope="module")
def run() -> Run:
    orchestrator = Orchestrator(Registry.discover(), ROOT / "store")
    return orchestrator.run(orchestrator.plan(Recipe.load(RECIPE, SHARED)))


def test_little_is_lost_and_no_zero(run: Run) -> None:
    rows = {row["configuration"]: row for row in run.report["rows"]}
    assert rows["quantize"]["perplexity"] < 1.25 * rows["sparsify"]["perplexity"]
    assert rows["quantize"]["sparsity"] >= rows["sparsify"]["sparsity"]
    masks = load_file(run["sparsify"].folder / "masks.safetensors")
    model = run["quantize"].load_model()
    for layer, packed in masks.items():
        weight = model.get_parameter(f"{layer}.weight")
        assert not weight[~unpack_mask(packed, (weight.shape[0], weight.shape[1]))].any(), layer


def test_gptq_beats_rounding_on_every_layer_of_the_first_blocks(run: Run) -> None:
    """‖(W − Ŵ) X‖² of both quantizers on one walk's Hessians, with the mask and without."""
    from sqft_gptq import Gptq, Rtn

    from sqft.api import LinearStats, Statistic
    from sqft.data.windows import calibration_windows
    from sqft.kernels.grids import dequantize
    from sqft.modeling.calibration.walk import walk
    from sqft.modeling.loading import load_model
    from sqft.utils.progress import silent

    model, tokenizer = load_model(ModelSpec(run["sparsify"].folder / "model"))
    model.model.layers = model.model.layers[:4]
    windows = calibration_windows(run.plan.step("quantize").files["calibration"], tokenizer, 8, 256, 0)
    compared = []

    def compare(name: str, linear: torch.nn.Linear, stats: LinearStats) -> None:
        weight = linear.weight.detach().clone()
        assert stats.hessian is not None
        for mask in (None, weight != 0):
            errors = []
            for quantizer in (Gptq(group_size=64), Rtn(group_size=64)):
                difference = dequantize(quantizer.quantize(weight, mask, stats)) - weight
                errors.append(float((difference @ stats.hessian * difference).sum()))
            assert errors[0] <= errors[1], f"{name}: {errors}"
            compared.append(errors[0] / errors[1])

    names = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n}
    walk(model, windows, names, frozenset({Statistic.HESSIAN}), compare, "cpu", silent)
    assert len(compared) == 2 * 4 * 7
