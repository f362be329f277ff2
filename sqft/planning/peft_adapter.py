"""The LoRA adapter of stock peft that `evaluate` measures: found here or on the hub, and checked. No torch."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from sqft.checkpoints.safetensors import safetensors_header
from sqft.errors import ArtifactError, ModelError, SqftError
from sqft.planning.resolution import Resolver
from sqft.recipe.sections import Evaluate
from sqft.utils.hub import fetch, is_hub_id, not_asked
from sqft.utils.peft_config import CONFIG, read_config

PLACE = "evaluate.adapter"
WEIGHTS = "adapter_model.safetensors"


def find_adapter(section: Evaluate, resolver: Resolver) -> tuple[dict[str, Path], int]:
    """Return the files of the adapter that a section names, by role, and the number of its values, downloaded if it is
    one of the hub; note where it names another base than the recipe's model. A README is none of the files: a
    measurement does not depend on it. Nothing when there is none, or it is a mistake, which the resolver collects."""
    name, revision = section.adapter, section.adapter_revision
    if name is None:
        if revision is not None:
            resolver.report("evaluate.adapter_revision", "there is no adapter to have one; remove this")
        return {}, 0
    try:
        local = resolver.recipe.resolve(name)
        hub = is_hub_id(name, local)
        folder = fetch("model", name, revision, (CONFIG, WEIGHTS), local) if hub else local
    except SqftError as error:
        resolver.report(PLACE, str(error))
        return {}, 0
    if revision is not None and not hub:
        resolver.report("evaluate.adapter_revision", f"{local} is no Hugging Face id and has no revision; remove this")
    if folder.exists():
        resolver.file(str(folder), PLACE, folder=True)
    else:
        resolver.report(PLACE, f"there is no folder {local}{not_asked(name, local)}")
    called = f"the hub's {name}" if hub else str(folder)
    found = read_adapter(section, folder, called, hub, resolver)
    if found is None or resolver.problems:
        return {}, 0
    config, values = found
    base, own = config.get("base_model_name_or_path"), resolver.recipe.model.path
    if base and base != own and not (os.path.exists(base) and os.path.samefile(base, resolver.model.path)):
        resolver.note(PLACE, f"the adapter names '{base}' as its base, and is measured on {own}")
    return {"adapter": folder / WEIGHTS, "adapter.config": folder / CONFIG}, values


def read_adapter(
    section: Evaluate, folder: Path, called: str, hub: bool, resolver: Resolver
) -> tuple[dict[str, Any], int] | None:
    """Return the config and the number of values of an adapter that can act on the recipe's own model, where nothing
    else is measured. None where its files cannot be read.

    Args:
        section: names the adapter.
        folder: where it is.
        called: what messages call it.
        hub: whether the folder is of the hub's cache, which has only the files that were asked for.
        resolver: collects what is wrong.
    """
    if section.of != ("model",):
        resolver.report(PLACE, 'acts on the recipe\'s own model alone; set evaluate.of to ["model"]')
    if not folder.is_dir():
        return None  # that is said
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            offline = ", or it is not in the hub's cache and could not be downloaded" if hub else ""
            advice = f"name {'an' if hub else 'the folder of an'} adapter that peft saved"
            if name == WEIGHTS and (hub or (folder / "adapter_model.bin").is_file()):
                advice = (
                    "sqft reads no pickles (adapter_model.bin): convert it: load it with peft, and save it with "
                    "safe_serialization=True"
                )
            resolver.report(PLACE, f"{called} has no {name}{offline}; {advice}")
            return None
    try:
        config = read_config(folder, called)
        values = sum(map(math.prod, safetensors_header(folder / WEIGHTS).values()))
    except (ArtifactError, ModelError) as error:
        resolver.report(PLACE, str(error))
        return None
    kind = config.get("peft_type")
    if kind != "LORA" or config.get("alora_invocation_tokens"):
        what = "an activated LoRA" if kind == "LORA" else kind
        message = f"{called} holds {what}, and sqft measures LoRA; merge it with peft, and name the result"
        resolver.report(PLACE, message)
    return config, values
