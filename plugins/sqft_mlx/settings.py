"""What mlx_lm computes of a model's config.json, and which grids MLX has. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""By `model_type` of config.json: those that were compared with mlx_lm."""
SCALED = {
    "default": set[str](),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
"""Ways to scale positions, with their settings."""
SIZES = (128, 64, 32)
"""The inputs of a group in MLX."""


def refusal_of_config(config: Mapping[str, Any]) -> str | None:
    """Return why mlx_lm would compute another model; None when it computes this one, or nothing is known of it."""
    kind = config.get("model_type")
    if kind is None:
        return None
    if kind not in FAMILIES:
        return f"'mlx' writes models of {', '.join(FAMILIES)}, and this one's model_type is {kind}"
    if (found := config.get("hidden_act", "silu")) != "silu":
        return f"mlx_lm computes silu in models of {kind}, and this one has {found}"
    if config.get("attention_bias") and kind == "qwen3":
        return "mlx_lm has no biases of attention in models of qwen3"
    rope = positions(config)
    scaled = rope.get("rope_type", "default")
    if scaled not in SCALED:
        return f"'mlx' cannot write positions that are scaled by '{scaled}'"
    known = {"rope_type", "type", "rope_theta"} | SCALED[scaled]
    if more := sorted(name for name in rope.keys() - known if rope[name] not in (None, 1.0)):
        return f"'mlx' cannot write {more[0]} of positions"
    window = config.get("sliding_window") if kind == "mistral" or config.get("use_sliding_window") else None
    if window and window < config.get("max_position_embeddings", window + 1):
        return (
            f"mlx_lm has no sliding window in models of {kind}; where no text is longer than {window} tokens, set "
            "sliding_window to null in config.json"
        )
    return None


def positions(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return how positions are turned and scaled, as either form of config.json has it."""
    older = config.get("rope_scaling") or {}
    return {"rope_type": older.get("type", "default"), **older, **(config.get("rope_parameters") or {})}


def refusal_of_grid(grid: Mapping[str, Any]) -> str | None:
    """Return why MLX has no place for codes on grids with these settings of a quantizer; None when it has.

    Args:
        grid: `bits`, `group_size` and whether groups are in `act_order`, where they are known.
    """
    if grid.get("act_order"):
        return "groups in act-order have no place in MLX; add static_groups to act_order, or use reorder_groups"
    if (size := grid.get("group_size", -1)) != -1 and size % SIZES[-1]:
        return f"MLX's groups are of {', '.join(map(str, SIZES[::-1]))} inputs, and groups of {size} are no multiple"
    return None


def written(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says in addition, for a config with all defaults: mlx_lm has defaults of its own, and of
    most families it reads the base of positions and their scaling only as transformers 4 wrote them."""
    rope = positions(config)
    scaling = rope if rope["rope_type"] != "default" else None
    return {**config, "rope_theta": rope["rope_theta"], "rope_scaling": scaling}
