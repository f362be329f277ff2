"""Names among which a recipe chooses, as transformers has them."""

from __future__ import annotations

from typing import Literal

Schedule = Literal[
    "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"
]

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab", "dvclive"]

OptimizerName = Literal[
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "sgd",
    "adagrad",
    "rmsprop",
    "adamw_8bit",
    "paged_adamw_8bit",
    "paged_adamw_32bit",
    "ademamix",
    "ademamix_8bit",
    "paged_ademamix_8bit",
    "paged_ademamix_32bit",
    "lion_8bit",
    "lion_32bit",
    "paged_lion_8bit",
    "paged_lion_32bit",
    "rmsprop_bnb_8bit",
    "rmsprop_bnb_32bit",
]
"""Those of transformers' optimizers that train adapters as they are; what each needs is in `planning/optimizers.py`."""
