"""Names that torch and transformers do not promise to keep: where each test fails, its message says what to do."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import GptOssConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from sqft.modeling import compat


def tiny_mixtral() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=8, hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip


def test_fake_tensors_run_without_values() -> None:
    """When this fails: torch moved FakeTensorMode. Look for `fake_tensor` in torch's sources, and correct the import in
    `sqft.modeling.compat`; without it, let `fake_tensors` raise, and the dry run of calibration is passed over."""
    layer, x = nn.Linear(3, 5, device="meta"), torch.zeros(2, 3, device="meta")
    with compat.fake_tensors():
        assert layer(x).shape == (2, 5)


def test_transformers_reads_gguf_with_the_class_it_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When this fails: transformers takes gguf's reader by another name (modeling_gguf_pytorch_utils.py). Correct
    `fast_gguf`; without it GGUF files are read as well, in three times the time."""
    gguf = pytest.importorskip("gguf")
    stock = gguf.GGUFReader

    def reads(*_: object) -> None:
        raise InterruptedError

    with monkeypatch.context() as patched, compat.fast_gguf():
        assert gguf.GGUFReader is not stock and issubclass(gguf.GGUFReader, stock)
        patched.setattr(gguf.GGUFReader, "__init__", reads)
        (tmp_path / "m.gguf").write_bytes(b"")
        with pytest.raises(InterruptedError):
            load_gguf_checkpoint(str(tmp_path / "m.gguf"))
    assert gguf.GGUFReader is stock


def test_int4_linear_multiplies_by_the_weight() -> None:
    """When this fails: torch renamed or changed its int4 kernel for CPUs (`int4pack` in aten/native_functions.yaml).
    Correct both names in `sqft.modeling.compat`; without the kernel, let `PackedWeight.prepare_int4_kernel` return
    False, and decoding takes the slower way."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (32, 64), generator=generator, dtype=torch.int32)
    scale, offset = torch.rand(2, 2, 32, generator=generator)  # [groups, out] each
    pairs = torch.stack([scale, offset], -1).bfloat16()
    x = torch.randn(3, 64, generator=generator).bfloat16()
    weight = (codes.float() - 8) * pairs[..., 0].float().T.repeat_interleave(32, 1)
    weight += pairs[..., 1].float().T.repeat_interleave(32, 1)
    found = compat.int4_linear(x, compat.int4_layout(codes), 32, pairs)
    torch.testing.assert_close(found.float(), F.linear(x.float(), weight), rtol=0.02, atol=0.2)


def test_ddp_leaves_alone_what_it_is_told() -> None:
    """When this fails: torch renamed the attribute that DistributedDataParallel reads. Look for
    `params_and_buffers_to_ignore` in torch/nn/parallel/distributed.py, and correct `keep_out_of_ddp`; without it every
    forward would send all packed codes from the first process to the others."""
    module = nn.Linear(3, 2)
    compat.keep_out_of_ddp(module, ["weight"])
    # The group without a network: gloo's own can wait for ever where the machine's name means nothing.
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(module)
        assert wrapped.parameters_to_ignore == {"weight"}
    finally:
        torch.distributed.destroy_process_group()


def test_what_a_mixture_says_of_itself() -> None:
    """When this fails: transformers renamed what `use_experts_implementation` (integrations/moe.py) gives its fused
    experts: `_apply_gate`, `has_gate`, `is_transposed`, `is_concatenated`, `has_bias`. Correct `apply_gate_of` and
    `traits_of_experts`; the gate is to be act(gate) · up of the two halves."""
    sizes = {"vocab_size": 8, "hidden_size": 4, "intermediate_size": 6, "num_local_experts": 2}
    fused = MixtralExperts(MixtralConfig(**sizes))
    assert compat.traits_of_experts(fused) == compat.ExpertTraits(True, False, False, False)
    apply_gate, both = compat.apply_gate_of(fused), torch.randn(5, 12)
    assert apply_gate is not None
    gate, up = both.chunk(2, -1)
    torch.testing.assert_close(apply_gate(both), F.silu(gate) * up)
    gpt_oss = GptOssExperts(GptOssConfig(**sizes))
    assert compat.traits_of_experts(gpt_oss) == compat.ExpertTraits(True, True, True, True)
    assert compat.traits_of_experts(nn.Linear(2, 2)) is None and compat.apply_gate_of(nn.Linear(2, 2)) is None


def test_only_compat_names_them() -> None:
    """A name with an underscore of torch or transformers is reached through `compat` alone."""
    import sqft.modeling

    private = ("torch._", "aten._", "._apply_gate", "._ddp_")
    for file in sorted(Path(sqft.modeling.__path__[0]).rglob("*.py")):
        if file.name != "compat.py":
            assert not [name for name in private if name in file.read_text("utf-8")], file


def test_conversions_of_a_checkpoint_go_both_ways() -> None:
    """When this fails: transformers moved how it renames tensors (conversion_mapping.py and core_model_loading.py).
    Correct `weight_conversions`, `converted_name`, `keep_conversions` and `reverted`: what `from_pretrained` does to
    the names of a checkpoint, and `save_pretrained` undoes. Without them sqft can compare no header with modules."""
    with torch.device("meta"):
        model = MixtralForCausalLM(tiny_mixtral())
    conversions, state = compat.weight_conversions(model), model.state_dict()
    stored = "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert compat.converted_name(model, conversions, stored, state) == "model.layers.0.mlp.experts.gate_up_proj"
    assert compat.converted_name(model, conversions, "norm.weight", state) == "model.norm.weight"
    assert any(one.was_used() for one in conversions)
    fused = {"model.layers.0.mlp.experts.gate_up_proj": torch.arange(24.0).reshape(2, 6, 2)}
    assert compat.reverted(model, fused)[stored].equal(fused["model.layers.0.mlp.experts.gate_up_proj"][1, 3:])
    compat.keep_conversions(model, [])
    assert compat.reverted(model, fused) == fused


def test_tensors_of_a_checkpoint_are_loaded_through_the_conversions(tmp_path: Path) -> None:
    """When this fails: transformers moved `convert_and_load_state_dict_in_model` (core_model_loading.py), its
    `LoadStateDictConfig` (modeling_utils.py) or `_weight_conversions`. Correct `load_converted` and
    `kept_conversions`; without them no folder of codes can be read."""
    written = MixtralForCausalLM(tiny_mixtral())
    written.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = MixtralForCausalLM(tiny_mixtral())
    assert compat.load_converted(model, {**tensors, "more.weight": torch.ones(2)}) == []
    for name, tensor in written.named_parameters():
        assert model.get_parameter(name).equal(tensor), name
    names = {type(one).__name__ for one in compat.kept_conversions(model)}
    assert names == {"WeightConverter", "WeightRenaming"}
    assert compat.load_converted(model, {"model.norm.weight": torch.ones(2)}) == ["model.norm.weight"]


def test_activations_are_computed_again_without_a_warning(model: LlamaForCausalLM) -> None:
    """When this fails: transformers renamed `activation_checkpointing_enable`, or its arguments. Correct
    `compute_activations_again`; without it, `finetune.gradient_checkpointing` does nothing."""
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.compute_activations_again(model)
    entered: list[int] = []
    model.model.layers[0].self_attn.register_forward_pre_hook(lambda *_: entered.append(1))
    model(input_ids=torch.arange(1, 9)[None]).logits.sum().backward()
    assert len(entered) == 2
