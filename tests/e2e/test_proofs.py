"""What the proofs of quantize and merge find, where layers carry biases and where logits are no numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sqft import Orchestrator, Recipe, Registry
from sqft.errors import ArtifactError
from sqft.modeling.loading import load_model
from sqft.stages import merge, quantize

BIAS = "model.layers.1.mlp.up_proj.bias"


@pytest.fixture
def biased(raw: dict[str, Any], tokenizer: Any, tmp_path: Path) -> dict[str, Any]:
    """QA-SparsePEFT on a model whose layers all have a bias."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    biases = {"attention_bias": True, "mlp_bias": True}
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, eos_token_id=1, **sizes, **biases)
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path / "biased")
    tokenizer.save_pretrained(tmp_path / "biased")
    raw["model"]["path"] = str(tmp_path / "biased")
    raw["quantize"] = {"quantizer": {"name": "rtn", "options": {"group_size": 32}}}
    raw["sparsify"]["scorer"] = "magnitude"
    raw["finetune"] |= {"merger": "qa-sparsepeft", "steps": 2}
    raw["finetune"]["adapter"]["options"]["ranks"] = [4]
    raw["search"] = {"data": raw["search"]["data"]}
    del raw["calibration"], raw["evaluate"]
    return raw


def run(raw: dict[str, Any], registry: Registry, store: Path) -> Any:
    orchestrator = Orchestrator(registry, store)
    return orchestrator.run(orchestrator.plan(Recipe.parse(raw)))


def test_biases_beside_codes(
    biased: dict[str, Any], registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay bit for bit through codes and merge; one that moved or is gone is found, by either proof."""
    changes: dict[str, Callable[[Tensor], Tensor | None]] = {
        "moved": lambda t: t.nextafter(torch.tensor(9.0)),
        "nan": lambda t: t.index_fill(0, torch.tensor(3), math.nan),
        "gone": lambda _: None,
    }
    wanted = {
        ("quantize", "moved"): rf"quantize .*: {BIAS} as stored is not the base's",
        ("quantize", "nan"): rf"quantize .*: {BIAS} as stored is not the base's",
        ("quantize", "gone"): rf"quantize .*: {BIAS} of the base is not stored",
        ("merge", "moved"): rf"merge .*: {BIAS} as stored is not the weight that training used",
        ("merge", "nan"): rf"{BIAS} holds values that are not finite",
        ("merge", "gone"): rf"disagree about tensor {BIAS}",
    }
    for (stage, how), words in wanted.items():
        with monkeypatch.context() as patched, pytest.raises(ArtifactError, match=words):
            spoil(patched, quantize if stage == "quantize" else merge, changes[how])
            run(biased, registry, tmp_path / "store")
    finished = run(biased, registry, tmp_path / "store")
    original = {n: t for n, t in load_file(tmp_path / "biased" / "model.safetensors").items() if n.endswith("bias")}
    assert len(original) == 14 and finished["merge"].report["codes_changed"] > 0
    for step in ("quantize", "merge"):
        stored = load_file(finished[step].folder / "model" / "model.safetensors")
        assert all(stored[name].equal(tensor) for name, tensor in original.items())
    assert finished["merge"].report["logits_difference"] < 1e-4


def spoil(patched: pytest.MonkeyPatch, stage: Any, change: Callable[[Tensor], Tensor | None]) -> None:
    """What a stage stores has one bias changed, after the logits were compared."""
    from sqft.modeling.loading import quantized as checkpoint

    save = checkpoint.save_torch_state_dict

    def another(tensors: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        changed = change(tensors[BIAS])
        rest = {name: tensor for name, tensor in tensors.items() if name != BIAS}
        save(rest if changed is None else rest | {BIAS: changed}, *args, **kwargs)

    def save_spoilt(*args: Any) -> None:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(checkpoint, "save_torch_state_dict", another)
            checkpoint.save_quantized(*args)

    patched.setattr(stage, "save_quantized", save_spoilt)
    patched.setattr(merge, "logits_difference", lambda *_: 0.0)


@pytest.mark.parametrize(
    ("theirs", "ours"), [(0.0, math.nan), (math.nan, 0.0), (math.nan, math.nan), (math.inf, 0.0), (math.inf, math.inf)]
)
def test_logits_that_are_no_numbers_prove_nothing(
    biased: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    theirs: float,
    ours: float,
) -> None:
    """Of the merged model or of the one that trained, or of both alike."""
    del biased["quantize"]
    biased["finetune"]["merger"] = "sparsepeft"

    def add(model: Any, value: float) -> None:
        def hook(_: Any, __: Any, output: Any) -> None:
            output.logits[0, -1, 7] += value

        model.register_forward_hook(hook)

    def opened(*args: Any) -> Any:
        model, tokenizer = load_model(*args)
        add(model, ours)
        return model, tokenizer

    load = merge.load_adapted_model

    def trained(*args: Any) -> Any:
        adapted = load(*args)
        add(adapted.model, theirs)
        return adapted

    monkeypatch.setattr(merge, "load_model", opened)
    monkeypatch.setattr(merge, "load_adapted_model", trained)
    with pytest.raises(ArtifactError, match="merge: the logits of the merged model, or of the model that was trained"):
        run(biased, registry, tmp_path / "store")
