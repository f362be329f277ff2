"""Bad input around quantization: each gives one message with place, expectation and remedy, and nothing is made."""

# ruff: noqa: E501
from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from sqft_gptq.solver import round_to_nearest

from sqft.cli import main
from sqft.kernels.packing import to_gptq

Change = Callable[[dict[str, Any]], object]
GROUP = {"name": "gptq", "options": {"group_size": 32}}


@pytest.fixture
def quantized(raw: dict[str, Any]) -> dict[str, Any]:
    raw["quantize"] = {"quantizer": copy.deepcopy(GROUP)}
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["search"] = {}
    raw["evaluate"] = {"of": ["merge"], "perplexity": raw["evaluate"]["perplexity"]}
    return raw


def said(recipe: dict[str, Any], folder: Path, *options: str) -> str:
    """What `sqft run` says of a recipe that it refuses."""
    place, store = folder / "recipe.json", folder / "store"
    place.write_text(json.dumps(recipe))
    done = CliRunner().invoke(main, ["run", str(place), "--store", str(store), *options])
    assert done.exit_code == 2, f"{done.exit_code}: {done.stderr}\n{done.exception!r}"
    assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
    return done.stderr


def option(**options: Any) -> Change:
    return lambda r: r["quantize"]["quantizer"]["options"].update(options)


def drop(*sections: str) -> Change:
    return lambda r: [r.pop(section) for section in sections]


def both(*changes: Change) -> Change:
    return lambda r: [change(r) for change in changes]


def section(name: str, **values: Any) -> Change:
    return lambda r: r[name].update(values)


IN_THE_RECIPE: dict[str, tuple[Change, str]] = {
    "a group size nobody stores": (option(group_size=48), "options.group_size: input should be -1, 32, 64 or 128"),
    "a group size that fits nothing": (option(group_size=128), "not a multiple of group_size 128"),
    "a group size that fits some": (option(group_size=64), "sizes that fit: 32, -1 (12 such layers; or set"),
    "bits that no format holds": (option(bits=5), "options.bits: input should be 2, 3, 4 or 8, found 5"),
    "bits that fill no words": (option(bits=3), "16 outputs of 3 bits do not fill the 32-bit words"),
    "bits as text": (option(bits="4"), 'options.bits: input should be 2, 3, 4 or 8, found "4"'),
    "no damping": (option(damp=0), "options.damp: input should be greater than 0"),
    "an option misspelt": (option(groupsize=32), "quantize.quantizer.options.groupsize"),
    "a quantizer misspelt": (
        section("quantize", quantizer="gtpq"),
        "no quantizer named 'gtpq'; installed: gptq, rtn. Did you mean 'gptq'?",
    ),
    "a quantizer that is a scorer": (section("quantize", quantizer="wanda"), "no quantizer named 'wanda'"),
    "no calibration": (
        both(drop("calibration"), section("sparsify", scorer="magnitude")),
        "calibration: is missing: quantizer 'gptq' needs hessian",
    ),
    "calibration beyond the window": (
        section("calibration", length=512),
        "calibration.length: 512 tokens, but the model's window is 256",
    ),
    "layers that are not there": (section("quantize", include=["w_proj"]), "quantize.include: matches no linear layer"),
    "blocks that differ": (
        section("quantize", exclude=["model.layers.0.*"]),
        "quantize.include: differs from block to block",
    ),
    "a float merger": (
        section("finetune", merger="sparsepeft"),
        "finetune.merger: 'sparsepeft' works on a dense or sparse base, but this recipe's is quantized; use hira or qa-sparsepeft or unmerged",
    ),
    "a merger that leaves nothing to merge": (
        section("finetune", merger="unmerged"),
        "merge: merger 'unmerged' leaves the adapter beside the base",
    ),
    "a quantized merger on floats": (
        drop("quantize"),
        "'qa-sparsepeft' works on a quantized base, but this recipe's is sparse",
    ),
    "dropout through a rounding": (
        lambda r: r["finetune"]["adapter"]["options"].update(dropout=0.1),
        "finetune.adapter.options.dropout: 'qa-sparsepeft' rounds the merged weight",
    ),
    "codes where there are none": (
        both(drop("quantize"), section("finetune", base="codes")),
        "finetune.base: there are no codes: this recipe does not quantize",
    ),
    "what was rounded where nothing is": (
        both(drop("quantize"), section("finetune", base="compensated")),
        "finetune.base: there are no codes: this recipe does not quantize",
    ),
    "a base that is no word": (
        section("finetune", base="int4"),
        "finetune.base: input should be 'floats', 'packed', 'codes' or 'compensated', found \"int4\"",
    ),
    "a mask of codes over floats": (
        section("finetune", mask="codes"),
        "finetune.mask: only a model that is already quantized needs this",
    ),
    "an evaluation of what is not made": (
        both(drop("quantize", "finetune", "search", "merge"), section("evaluate", of=["quantize"])),
        "'quantize' is not made by this recipe",
    ),
}


@pytest.mark.parametrize("case", IN_THE_RECIPE)
def test_in_the_recipe(case: str, quantized: dict[str, Any], tmp_path: Path) -> None:
    change, message = IN_THE_RECIPE[case]
    change(quantized)
    assert message in said(quantized, tmp_path)
    assert not list((tmp_path / "store").glob("artifacts/*"))


@pytest.fixture(scope="session")
def theirs(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A GPTQ model of the tiny one."""
    from sqft import Orchestrator, Recipe, Registry

    recipe = {
        "name": "theirs",
        "model": {"path": str(model_folder)},
        "quantize": {"quantizer": {"name": "rtn", "options": {"group_size": 32}}},
    }
    orchestrator = Orchestrator(Registry.discover(), tmp_path_factory.mktemp("store"))
    return orchestrator.run(orchestrator.plan(Recipe.parse(recipe)))["quantize"].folder / "model"


LAYER = "model.layers.1.mlp.up_proj"


def tensors(**parts: Callable[[torch.Tensor], torch.Tensor | None]) -> Callable[[Path], None]:
    """Change or drop parts of one layer."""

    def change(folder: Path) -> None:
        whole = load_file(folder / "model.safetensors")
        for part, make in parts.items():
            new = make(whole.pop(f"{LAYER}.{part}"))
            if new is not None:
                whole[f"{LAYER}.{part}"] = new.contiguous()
        save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def config(**values: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"].update(values)
        (folder / "config.json").write_text(json.dumps(content))

    return change


def whole_config(value: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(content | {"quantization_config": value}))

    return change


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def only_floats(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in whole.items() if tensor.is_floating_point() and "scales" not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.index_fill(0, torch.tensor([0]), float("nan"))


def codes_for_a_short_head(folder: Path) -> None:
    whole = load_file(folder / "model.safetensors")
    head = whole.pop("lm_head.weight")[:256] * 2  # a multiple of what fills a word
    parts = to_gptq(round_to_nearest(head, None, 4, 32, True, False))
    whole |= {f"lm_head.{part}": tensor for part, tensor in parts.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})


IN_THE_CHECKPOINT: dict[str, tuple[Callable[[Path], None], str]] = {
    "another format": (
        config(quant_method="awq"),
        "is already quantized (awq); of quantized models sqft reads only GPTQ",
    ),
    "another version": (config(checkpoint_format="gptq_v2"), "is already quantized (gptq_v2)"),
    "bits that GPTQ has not": (config(bits=5), "quantization_config has bits 5 and group_size 32"),
    "a group size of nothing": (config(group_size=0), "quantization_config has bits 4 and group_size 0"),
    "settings that are no object": (whole_config("gptq"), "is already quantized (unknown method)"),
    "floats that say they are codes": (
        only_floats,
        "says that the model is quantized, but there is no .qweight tensor",
    ),
    "no scales": (tensors(scales=lambda _: None), f"{LAYER}.scales is missing, expected [1, 64]; copy the model again"),
    "no zero points": (tensors(qzeros=lambda _: None), f"{LAYER}.qzeros is missing, expected [1, 8]"),
    "zero points too few": (tensors(qzeros=lambda t: t[:, :3]), f"{LAYER}.qzeros is [1, 3], expected [1, 8]"),
    "codes in a row": (tensors(qweight=lambda t: t.flatten()), f"{LAYER}.qweight is [256], expected [words, outputs]"),
    "codes in a cube": (
        tensors(qweight=lambda t: t[..., None].repeat(1, 1, 2)),
        f"{LAYER}.qweight is [4, 64, 2], expected [words, outputs]",
    ),
    "order without an index": (
        lambda f: (config(desc_act=True)(f), tensors(g_idx=lambda _: None)(f)),
        f"{LAYER}.g_idx is missing",
    ),
    "codes without their settings": (
        whole_config(None),
        "has packed codes (.qweight), but no quantization_config",
    ),
    "another file of weights": (
        lambda f: shutil.copy(f / "model.safetensors", f / "old.safetensors"),
        "has old.safetensors beside the weights that transformers reads",
    ),
    "no codes for a layer": (tensors(qweight=lambda _: None), f"{LAYER}.qweight is missing; copy the model again"),
    "bits that are no integer": (config(bits=4.0), "quantization_config has bits 4.0"),
    "an index below 0": (
        tensors(g_idx=lambda t: t - 1),
        f"the parts of {LAYER} do not fit together: g_idx has a group below 0",
    ),
    "a file cut short": (cut, "is not a complete safetensors file"),
    "an index out of range": (tensors(g_idx=lambda t: t + 7), f"the parts of {LAYER} do not fit together"),
    "codes of a head that is shorter than the vocabulary": (
        codes_for_a_short_head,
        "lm_head.weight is [256, 32], and config.json makes it [258, 32]",
    ),
    "scales that are not finite": (tensors(scales=nan), f"tensor {LAYER}.scales holds values that are not finite"),
    "codes of another model": (
        tensors(qweight=lambda t: t[:, :32], qzeros=lambda t: t[:, :4], scales=lambda t: t[:, :32]),
        LAYER,
    ),
}


@pytest.mark.parametrize("case", IN_THE_CHECKPOINT)
def test_in_the_checkpoint(case: str, quantized: dict[str, Any], theirs: Path, tmp_path: Path) -> None:
    change, message = IN_THE_CHECKPOINT[case]
    folder = tmp_path / "theirs"
    shutil.copytree(theirs, folder)
    change(folder)
    for name in ("sparsify", "quantize", "calibration"):
        quantized.pop(name)
    quantized["model"]["path"] = str(folder)
    assert message in said(quantized, tmp_path)


def test_what_cannot_be_done_with_codes(quantized: dict[str, Any], theirs: Path, tmp_path: Path) -> None:
    quantized["model"]["path"] = str(theirs)
    message = said(quantized, tmp_path)
    for name in ("sparsify", "quantize"):
        assert f"{name}: the model is already quantized; remove this section" in message
    for name in ("sparsify", "quantize", "calibration"):
        quantized.pop(name)
    quantized["finetune"] |= {"base": "floats", "merger": "sparsepeft"}
    message = said(quantized, tmp_path)
    assert "finetune.base: the model has no floats, only codes" in message
    assert "works on a dense or sparse base, but this recipe's is quantized" in message
    quantized["finetune"]["base"] = "compensated"
    assert "finetune.base: the model came as codes, without the floats that were rounded" in said(quantized, tmp_path)


def test_a_model_that_is_not_there_is_one_mistake(quantized: dict[str, Any], tmp_path: Path) -> None:
    for name in ("sparsify", "quantize", "calibration"):
        quantized.pop(name)
    quantized["model"]["path"] = str(tmp_path / "nowhere")
    quantized["export"] = [{"exporter": "gptq"}]
    message = said(quantized, tmp_path)
    assert "1 problem" in message and "model.path: no file or folder" in message


def test_calibration_too_short(quantized: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("A few words.")
    quantized["calibration"]["data"] = str(tmp_path / "short.txt")
    assert "short.txt" in said(quantized, tmp_path)


def test_a_mask_that_is_not_the_bases(quantized: dict[str, Any], tmp_path: Path) -> None:
    """Somebody edits the artifact: its checksum tells, before anything is trained."""
    place, store = tmp_path / "recipe.json", tmp_path / "store"
    place.write_text(json.dumps(quantized))
    done = CliRunner().invoke(main, ["run", str(place), "--store", str(store), "--until", "quantize"])
    assert done.exit_code == 0, done.stderr
    (file,) = store.glob("artifacts/quantize-*/masks.safetensors")
    masks = load_file(file)
    save_file({name: mask ^ 1 for name, mask in masks.items()}, file)
    assert "masks.safetensors" in said(quantized, tmp_path)


def test_a_mask_of_codes_for_an_adapter_beside_them(
    raw: dict[str, Any], quantized_folder: Path, tmp_path: Path
) -> None:
    raw["model"]["path"] = str(quantized_folder)
    raw["finetune"] |= {"merger": "unmerged", "mask": "codes"}
    for name in ("sparsify", "merge", "evaluate"):
        del raw[name]
    assert "finetune.mask: 'unmerged' does not change the codes" in said(raw, tmp_path)
