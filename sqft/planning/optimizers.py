"""What each optimizer needs: memory, which of AdamW's constants it takes, and a package. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

from sqft.errors import Problem
from sqft.recipe.choices import OptimizerName
from sqft.recipe.sections import Finetune

ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
LION = ("adam_beta1", "adam_beta2")
BITSANDBYTES = "bitsandbytes"


@dataclass(frozen=True)
class Optimizer:
    """An optimizer as the plan knows it.

    Args:
        state: bytes that it keeps for each trained parameter of a large matrix. Of small ones some keep more.
        constants: the fields of `finetune` for constants of AdamW that transformers passes on to it.
        package: what has to be installed for it; empty: nothing besides torch and transformers.
    """

    state: int
    constants: tuple[str, ...] = ()
    package: str = ""


OPTIMIZERS: dict[OptimizerName, Optimizer] = {
    "adamw_torch": Optimizer(8, ADAM),
    "adamw_torch_fused": Optimizer(8, ADAM),
    "adafactor": Optimizer(2),  # a row and a column of each matrix, whose rank is 2 or more
    "sgd": Optimizer(0),
    "adagrad": Optimizer(4),
    "rmsprop": Optimizer(4),
    "adamw_8bit": Optimizer(2, ADAM, BITSANDBYTES),
    "paged_adamw_8bit": Optimizer(2, ADAM, BITSANDBYTES),
    "paged_adamw_32bit": Optimizer(8, ADAM, BITSANDBYTES),
    "ademamix": Optimizer(12, ADAM, BITSANDBYTES),
    "ademamix_8bit": Optimizer(3, ADAM, BITSANDBYTES),
    "paged_ademamix_8bit": Optimizer(3, ADAM, BITSANDBYTES),
    "paged_ademamix_32bit": Optimizer(12, ADAM, BITSANDBYTES),
    "lion_8bit": Optimizer(1, LION, BITSANDBYTES),
    "lion_32bit": Optimizer(4, LION, BITSANDBYTES),
    "paged_lion_8bit": Optimizer(1, LION, BITSANDBYTES),
    "paged_lion_32bit": Optimizer(4, LION, BITSANDBYTES),
    "rmsprop_bnb_8bit": Optimizer(1, package=BITSANDBYTES),
    "rmsprop_bnb_32bit": Optimizer(4, package=BITSANDBYTES),
}


def check_optimizer(section: Finetune) -> Iterator[Problem]:
    """Check that the optimizer is installed, and has the constants that the recipe gives it."""
    name, optimizer = section.optimizer, OPTIMIZERS[section.optimizer]
    if optimizer.package and find_spec(optimizer.package) is None:
        others = ", ".join(other for other, needs in OPTIMIZERS.items() if not needs.package)
        yield Problem(
            "finetune.optimizer",
            f"'{name}' needs {optimizer.package}, which is not installed; pip install {optimizer.package}, or use one "
            f"of {others}",
        )
    for constant in ADAM:
        if constant in section.model_fields_set and constant not in optimizer.constants:
            yield Problem(f"finetune.{constant}", f"optimizer '{name}' has no such constant; remove this")
