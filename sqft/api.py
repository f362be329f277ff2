"""All that a plugin may import from sqft's core, besides `sqft.kernels`."""

from sqft.checkpoints.export import ShardSize, float_layers, parameters, write_config, write_shards
from sqft.checkpoints.gptq import gptq_config, gptq_incompatibility, write_gptq_config
from sqft.checkpoints.safetensors import read_tensor
from sqft.components.hookspecs import hookimpl
from sqft.components.kinds import Adapter, Allocator, Component, Exporter, Merger, Quantizer, Scorer, Searcher, Updater
from sqft.errors import ContractError, PluginError, SqftError, StageError
from sqft.types import (
    SPARSITY_TOLERANCE,
    BaseKind,
    BaseWeight,
    DeltaModule,
    Evaluate,
    Grid,
    InputPath,
    LinearShape,
    LinearStats,
    ModelReader,
    Quantized,
    RankConfig,
    RankGroup,
    SearchSpace,
    Select,
    Statistic,
)

__all__ = [
    "SPARSITY_TOLERANCE",
    "Adapter",
    "Allocator",
    "BaseKind",
    "BaseWeight",
    "RankConfig",
    "Component",
    "ContractError",
    "DeltaModule",
    "Evaluate",
    "Exporter",
    "Grid",
    "InputPath",
    "LinearShape",
    "LinearStats",
    "Merger",
    "ModelReader",
    "PluginError",
    "Quantized",
    "Quantizer",
    "RankGroup",
    "Scorer",
    "SearchSpace",
    "Searcher",
    "Select",
    "ShardSize",
    "SqftError",
    "StageError",
    "Statistic",
    "Updater",
    "float_layers",
    "gptq_config",
    "gptq_incompatibility",
    "hookimpl",
    "parameters",
    "read_tensor",
    "write_config",
    "write_gptq_config",
    "write_shards",
]
