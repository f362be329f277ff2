"""The LoRA adapter of stock peft that `evaluate` measures: found here or on the hub, and checked. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from sqft.checkpoints.safetensors import read_object, safetensors_header
from sqft.errors import ArtifactError, ModelError, Problem, SqftError
from sqft.planning.resolution import Resolver
from sqft.recipe.sections import Evaluate
from sqft.utils.hub import HUB_ID, fetch

PLACE = "evaluate.adapter"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""The files of an adapter that can change a result."""


def find_adapter(section: Evaluate, resolver: Resolver) -> Path | None:
    """Return the folder of the adapter that a section names, downloaded if it is one of the hub; note where it names
    another base than the recipe's model. None when there is none, or it is a mistake, which the resolver collects."""
    name = section.adapter
    if name is None:
        return None
    try:
        local = resolver.recipe.resolve(name)
        hub = HUB_ID.fullmatch(name) and not local.exists()
        folder = fetch("model", name, section.adapter_revision, (CONFIG, WEIGHTS), local) if hub else local
    except SqftError as error:
        resolver.report(PLACE, str(error))
        return None
    problems = list(check_adapter(section, resolver.file(str(folder), PLACE, folder=True)))
    resolver.collect(problems)
    if problems or resolver.problems:
        return None
    base, own = read_object(folder / CONFIG).get("base_model_name_or_path"), resolver.recipe.model.path
    if base and base != own and Path(base).expanduser().resolve() != resolver.model.path.resolve():
        resolver.note(PLACE, f"the adapter names '{base}' as its base, and is measured on {own}")
    return folder


def check_adapter(section: Evaluate, folder: Path) -> Iterator[Problem]:
    """Check that a folder holds an adapter that can act on the recipe's own model, and nothing else is measured."""
    if section.of != ("model",):
        yield Problem(PLACE, 'acts on the recipe\'s own model alone; set evaluate.of to ["model"]')
    if not folder.is_dir():
        return  # that is said
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            yield Problem(PLACE, f"{folder} has no {name}; name the folder of an adapter that peft saved")
            return
    try:
        config = read_object(folder / CONFIG)
        values_of(folder)
    except (ArtifactError, ModelError) as error:
        yield Problem(PLACE, str(error))
        return
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("alora_invocation_tokens"):
        what = "an activated LoRA" if kind == "LORA" else kind
        yield Problem(PLACE, f"{folder} holds {what}, and sqft measures LoRA; merge it with peft, and name the result")


def values_of(folder: Path) -> int:
    """Return the number of values of an adapter.

    Raises:
        ArtifactError: when its file is damaged.
    """
    return sum(map(math.prod, safetensors_header(folder / WEIGHTS).values()))
