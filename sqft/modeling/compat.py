"""Names of torch and transformers that are not public, each behind a function of ours.

`tests/modeling/test_compat.py` fails when one of them moves, and says what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import GenerationConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig, remove_tied_weights_from_state_dict

from sqft.checkpoints.gguf import gguf_reader


def fake_tensors() -> AbstractContextManager[Any]:
    """Run what is inside on tensors that have shapes and no values, a model on the meta device included."""
    return FakeTensorMode(allow_non_fake_inputs=True)


@contextmanager
def fast_gguf() -> Iterator[None]:
    """Let transformers read GGUF files with `gguf_reader`: it takes the class from its package whenever it needs it."""
    try:
        import gguf

        stock, fast = gguf.GGUFReader, gguf_reader()
    except ImportError:
        yield
        return
    gguf.GGUFReader = fast
    try:
        yield
    finally:
        gguf.GGUFReader = stock


def int4_layout(codes: Tensor) -> Tensor:
    """Lay codes [out, in], int32 in [0, 15], out for `int4_linear`."""
    laid_out: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    return laid_out


def int4_linear(x: Tensor, laid_out: Tensor, group_size: int, pairs: Tensor) -> Tensor:
    """Compute x Wᵀ [rows, out] of x [rows, in] on the CPU, bfloat16.

    `pairs` [groups, out, 2] holds scale and offset of each group: a code q is worth (q − 8) · scale + offset.
    """
    product: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, laid_out, group_size, pairs)
    return product


def keep_out_of_ddp(module: nn.Module, names: Iterable[str]) -> None:
    """Make torch's DistributedDataParallel leave these parameters and buffers of a module alone."""
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def compute_activations_again(model: PreTrainedModel) -> None:
    """Make a model keep only what goes into each layer, and compute the rest again in the backward pass."""
    # The older name warns where there are both.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


@dataclass(frozen=True)
class ExpertTraits:
    """What transformers says of a mixture that keeps the weights of all experts in one tensor.

    Args:
        gated: whether experts have a gate, in one tensor with "up".
        transposed: whether weights are [experts, in, out] instead of [experts, out, in].
        interleaved: whether the outputs of gate and up alternate.
        biased: whether experts have biases.
    """

    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool


def traits_of_experts(fused: Any) -> ExpertTraits | None:
    """Return what transformers says of a mixture's form; None when it says nothing."""
    if not hasattr(fused, "has_gate"):
        return None
    return ExpertTraits(fused.has_gate, fused.is_transposed, not fused.is_concatenated, fused.has_bias)


def apply_gate_of(fused: Any) -> Callable[[Tensor], Tensor] | None:
    """Return what a mixture's experts do with the outputs of gate and up, [tokens, 2 · inner] → [tokens, inner]; None
    when the mixture does not say."""
    return getattr(fused, "_apply_gate", None)


def weight_conversions(model: PreTrainedModel) -> list[Any]:
    """Return how transformers turns the tensors of this model's checkpoints into those of its modules, in order."""
    conversions: list[Any] = get_model_conversion_mapping(model)
    return conversions


def keep_conversions(model: PreTrainedModel, conversions: list[Any]) -> None:
    """Make `reverted`, and transformers' `save_pretrained`, undo these conversions of a model."""
    model._weight_conversions = conversions


def kept_conversions(model: PreTrainedModel) -> list[Any]:
    """Return the conversions that `keep_conversions` gave a model, or those that `from_pretrained` used for it."""
    conversions: list[Any] = model._weight_conversions
    return conversions


def converted_name(model: PreTrainedModel, conversions: list[Any], name: str, state: Mapping[str, Tensor]) -> str:
    """Return the name of the module's tensor that a checkpoint's tensor becomes, or part of.

    Args:
        model: gives the prefix that checkpoints may leave out.
        conversions: those that match are marked as used.
        name: in the checkpoint.
        state: the model's tensors as transformers names them.
    """
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    prefix = model.base_model_prefix
    renamed: str = rename_source_key(name, renamings, converters, prefix, state)[0]
    return rename_source_key(name, [], [], prefix, state)[0] if renamed not in state and name in state else renamed


def reverted(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of a model's modules as transformers would store them: named, split and laid out as on disk."""
    stored: dict[str, Tensor] = revert_weight_conversion(model, dict(state))
    return stored


def generation_settings(folder: Path) -> GenerationConfig:
    """Return the settings of generation that `from_pretrained` gives the model in a folder: those of their own file, or
    what its config says of them."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # there is no such file, or it cannot be read
        return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)


def without_tied(model: PreTrainedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return what `save_pretrained` would write of tensors of a model's modules: tied ones once."""
    ignored = model._keys_to_ignore_on_save or ()
    kept = {name: tensor for name, tensor in state.items() if name not in ignored}
    saved: dict[str, Tensor] = remove_tied_weights_from_state_dict(kept, model)
    return saved


def load_converted(model: PreTrainedModel, tensors: Mapping[str, Tensor]) -> list[str]:
    """Give a model tensors of a checkpoint as `from_pretrained` would, in the precision of its parameters.

    Returns:
        The tensors of another shape, by the names that its modules have.
    """
    how = LoadStateDictConfig(weight_mapping=weight_conversions(model))
    info, _ = convert_and_load_state_dict_in_model(model, dict(tensors), how)
    return sorted(name for name, *_ in info.mismatched_keys)
