"""A LoRA adapter of stock peft on the model that is measured: peft's own layers, not a merge."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from sqft.errors import ModelError
from sqft.modeling.loading.transformers_io import first_sentence, silent_transformers


def attach_peft_adapter(model: PreTrainedModel, folder: Path) -> int:
    """Put an adapter into a model's layers, as `peft.PeftModel.from_pretrained` does; return its number of values.

    Raises:
        ModelError: when peft cannot, or when model and adapter do not have the same parts: peft would leave some at
            their random values, or leave them out, with no more than a warning.
    """
    from peft import PeftConfig, PeftModel

    try:
        with silent_transformers():
            config = PeftConfig.from_pretrained(str(folder))
            config.inference_mode = True
            before = {id(parameter) for parameter in model.parameters()}
            loaded = PeftModel(model, config).load_adapter(str(folder), "default", torch_device=str(model.device))
    except Exception as error:  # peft's own checks of a config and of shapes raise anything
        raise ModelError(f"peft cannot put {folder} on this model: {first_sentence(error)}") from error
    for what, names in (("adapter has no", loaded.missing_keys), ("model has no place for", loaded.unexpected_keys)):
        if names:
            raise ModelError(f"{folder}: the {what} {names[0]}; name the model that the adapter was trained on")
    model.eval()
    return sum(parameter.numel() for parameter in model.parameters() if id(parameter) not in before)
