"""A model that is compressed one block at a time is, to the bit, what comes of it as a whole."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, save_family
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.safetensors import weight_files
from sqft.errors import ArtifactError, ModelError
from sqft.modeling.loading.folder_reader import FolderReader
from sqft.stages.inputs import StageInputs
from sqft.stages.stage import Stage, make_stage


def stages(
    recipe: dict[str, Any], registry: Registry, folder: Path, name: str, streamed: bool, **folders: Path
) -> Stage:
    """The stage of a step, in a scratch folder of its own."""
    plan = Orchestrator(registry, folder / "store").plan(Recipe.parse(recipe))
    step = dataclasses.replace(plan.step(name), streamed=streamed)
    scratch = folder / f"{name}-{'streamed' if streamed else 'whole'}"
    scratch.mkdir(exist_ok=True)
    return make_stage(StageInputs(plan, step, folders, scratch, "cpu"))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return dict(FolderReader(folder, weight_files(folder)).tensors())


def assert_same(one: Path, other: Path) -> None:
    for first, second in (
        (tensors(one / "model"), tensors(other / "model")),
        (load_file(one / "masks.safetensors"), load_file(other / "masks.safetensors")),
    ):
        assert first.keys() == second.keys()
        for name, tensor in first.items():
            assert tensor.dtype == second[name].dtype and tensor.equal(second[name]), name
    files = [
        sorted(p.name for p in (f / "model").iterdir() if p.suffix == ".json" and "index" not in p.name)
        for f in (one, other)
    ]
    assert files[0] == files[1]
    for name in files[0]:
        assert (one / "model" / name).read_bytes() == (other / "model" / name).read_bytes(), name


def assert_alike_both_ways(
    recipe: dict[str, Any], registry: Registry, folder: Path, name: str, **folders: Path
) -> None:
    """A step whose model is in memory as a whole, and one that is streamed, report and write the same."""
    reports = []
    for streamed in (False, True):
        stage = stages(recipe, registry, folder, name, streamed, **folders)
        reports.append(stage.run())
        stage.verify()
    assert reports[0] == reports[1]
    assert_same(folder / f"{name}-whole", folder / f"{name}-streamed")


@pytest.mark.parametrize(
    "changes",
    [{"scorer": "magnitude"}, {"scorer": "wanda", "allocator": "owl"}, {"scorer": "wanda", "updater": "least-squares"}],
)
def test_sparsify(raw: dict[str, Any], registry: Registry, tmp_path: Path, changes: dict[str, Any]) -> None:
    raw["sparsify"] |= changes
    raw["calibration"]["memory"] = 1e-6  # GiB: no hidden states stay in memory
    assert_alike_both_ways(raw, registry, tmp_path, "sparsify")
    AutoModelForCausalLM.from_pretrained(tmp_path / "sparsify-streamed" / "model")


@pytest.mark.parametrize(
    "options", [{}, {"refine": 2, "target": "dense"}, {"act_order": True, "bits": 2, "symmetric": False}]
)
def test_quantize(raw: dict[str, Any], registry: Registry, tmp_path: Path, options: dict[str, Any]) -> None:
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"bits": 4, "group_size": 32, **options}}}
    sparse = stages(raw, registry, tmp_path, "sparsify", True)
    sparse.run()
    assert_alike_both_ways(raw, registry, tmp_path, "quantize", base=tmp_path / "sparsify-streamed")
    folders = [tmp_path / f"quantize-{way}" for way in ("whole", "streamed")]
    first, second = (load_file(folder / "compensated.safetensors") for folder in folders)
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


@pytest.mark.parametrize(("name", "damaged"), [("sparsify", False), ("sparsify", True), ("quantize", False)])
def test_a_killed_step_goes_on_after_its_last_block(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, damaged: bool
) -> None:
    """Whose files must be as they were sealed."""
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["quantize"] = {"quantizer": {"name": "gptq", "options": {"bits": 4, "group_size": 32}}}
    base = {}
    if name == "quantize":
        stages(raw, registry, tmp_path, "sparsify", True).run()
        base = {"base": tmp_path / "sparsify-streamed"}
    stages(raw, registry, tmp_path, name, False, **base).run()
    compressed: list[str] = []

    def first_block(kind: type[Any], method: str, killed: bool) -> None:
        whole = getattr(kind, method)

        def called(self: Any, layer: str, *rest: Any) -> Any:
            if killed and layer.startswith("model.layers.1.mlp"):
                raise KeyboardInterrupt
            compressed.append(layer)
            return whole(self, layer, *rest)

        monkeypatch.setattr(kind, method, called)

    stage = stages(raw, registry, tmp_path, name, True, **base)
    method = "_prune" if name == "sparsify" else "_quantize"
    original = getattr(type(stage), method)
    first_block(type(stage), method, killed=True)
    with pytest.raises(KeyboardInterrupt):
        stage.run()
    monkeypatch.setattr(type(stage), method, original)
    compressed.clear()
    if damaged:
        file = tmp_path / f"{name}-streamed" / "model" / "model-00002-of-00003.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    stage = stages(raw, registry, tmp_path, name, True, **base)
    first_block(type(stage), method, killed=False)
    report = stage.run()
    stage.verify()
    again = {f"model.layers.{block}" for block in ((0, 1) if damaged else (1,))}
    assert len(compressed) == 7 * len(again) and {".".join(layer.split(".")[:3]) for layer in compressed} == again
    assert_same(tmp_path / f"{name}-whole", tmp_path / f"{name}-streamed")
    assert list(report["layers"]) == list(stage.inputs.step.layers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "family", [name for name, one in FAMILIES.items() if one.walk == "blocks" and name != "Zamba2"]
)
def test_every_family(raw: dict[str, Any], registry: Registry, tokenizer: Any, tmp_path: Path, family: str) -> None:
    dtype = "float32" if family == "xLSTM" else "bfloat16"  # it multiplies float32 with the model's precision
    folder = save_family(family, tokenizer, tmp_path / "model", getattr(torch, dtype))
    exclude = list(FAMILIES[family].unseen)
    recipe = {
        **{key: raw[key] for key in ("schema", "name", "calibration")},
        "model": {"path": str(folder), "dtype": dtype},
        "sparsify": {"scorer": "wanda", "exclude": exclude},
        "quantize": {
            "quantizer": {"name": "gptq", "options": {"bits": 4, "group_size": -1}},
            "exclude": [*exclude, *FAMILIES[family].floats],
        },
    }
    for name in ("sparsify", "quantize"):
        base = {"base": tmp_path / "sparsify-whole"} if name == "quantize" else {}
        assert_alike_both_ways(recipe, registry, tmp_path, name, **base)


def edited(model_folder: Path, folder: Path, edit: Any) -> Path:
    """A copy of a model folder with other tensors."""
    shutil.copytree(model_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def untie(tensors: dict[str, torch.Tensor]) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors["lm_head.weight"] = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=generator)


def both(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def only_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize("edit", [untie, both, only_head])
@pytest.mark.parametrize("settings", [True, False])
def test_a_head_that_config_ties(
    raw: dict[str, Any], registry: Registry, model_folder: Path, tmp_path: Path, edit: Any, settings: bool
) -> None:
    """It is tied as transformers does: not where the folder holds other values for it."""
    folder = edited(model_folder, tmp_path / "edited", edit)
    if not settings:  # those of generation come from the config then
        (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"temperature": 0.3, "do_sample": True}))
    raw["model"]["path"] = str(folder)
    raw["finetune"]["merger"] = "qa-sparsepeft"
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"bits": 4, "group_size": 32}}}
    for name in ("sparsify", "quantize"):
        base = {"base": tmp_path / "sparsify-whole"} if name == "quantize" else {}
        assert_alike_both_ways(raw, registry, tmp_path, name, **base)
    head = tensors(tmp_path / "sparsify-streamed" / "model").get("lm_head.weight")
    assert (head is not None) == (edit is untie)


def test_a_value_that_is_not_finite(
    raw: dict[str, Any], registry: Registry, model_folder: Path, tmp_path: Path
) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.input_layernorm.weight"][3] = float("nan")

    raw["model"]["path"] = str(edited(model_folder, tmp_path / "edited", spoil))
    with pytest.raises(ModelError, match=r"layers.1.input_layernorm.weight holds values that are not finite"):
        stages(raw, registry, tmp_path, "sparsify", True).run()


@pytest.mark.parametrize("content", ["[]", "null", '{"layers": {}}', '{"record": {}, "files": {}}', "{"])
def test_a_damaged_record_is_no_finished_part(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, content: str
) -> None:
    stage = stages(raw, registry, tmp_path, "sparsify", True)
    expected = stage.run()
    (tmp_path / "sparsify-streamed" / "checkpoints" / "parts" / "00001.json").write_text(content)
    again = stages(raw, registry, tmp_path, "sparsify", True)
    assert list(again.parts.records) == [""]  # type: ignore[attr-defined]
    assert again.run() == expected
    again.verify()


@pytest.mark.parametrize(
    ("name", "part", "words"),
    [
        ("model.layers.0.mlp.down_proj.weight", 2, "as stored is not the original under its mask"),
        ("model.norm.weight", 1, "as stored is not the original under its mask"),
    ],
)
def test_what_is_on_disk_is_proved(
    raw: dict[str, Any], registry: Registry, tmp_path: Path, name: str, part: int, words: str
) -> None:
    stage = stages(raw, registry, tmp_path, "sparsify", True)
    stage.run()
    file = tmp_path / "sparsify-streamed" / "model" / f"model-{part:05d}-of-00003.safetensors"
    written = load_file(file)
    written[name].view(-1)[-1] += 1
    save_file(written, file, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=words):
        stage.verify()
