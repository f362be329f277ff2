"""What a plan knows of a model's modules: its layers, and what sqft leaves alone. No torch.

`sqft.modeling.architecture.layout` makes it from the modules themselves.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sqft.types import LinearShape


@dataclass(frozen=True)
class LeftOut:
    """A part of a model or checkpoint that has no part in what sqft does, with the number of its weights and why."""

    name: str
    weights: int
    reason: str


@dataclass(frozen=True)
class ModelLayout:
    """The layers of a model by the names of its modules, and what a checkpoint of it lacks."""

    architecture: str = ""
    """Name of the class: "Gemma3ForConditionalGeneration"."""
    sizes: Mapping[str, int] = field(default_factory=dict)
    """Entries of the text model's config, by the names of most families: hidden_size, vocab_size, …"""
    linears: tuple[LinearShape, ...] = ()
    """The linear layers of the text model's decoder blocks, without routers, in order."""
    experts: tuple[str, ...] = ()
    """The modules that are one expert each."""
    left_out: tuple[LeftOut, ...] = ()
    """Towers of a multimodal model, mixtures that cannot be split, …"""
    outside: Mapping[str, str] = field(default_factory=dict)
    """The head and the embedding, by name -> what each is, for messages."""
    narrow: tuple[str, ...] = ()
    """The linear layers that are left out of pruning and quantization unless they are named."""
    walk: Literal["blocks", "model"] = "blocks"
    """How calibration runs the model: "blocks" (each by itself) or "model" (the whole model for each block; slower)."""
    walk_reason: str = ""
    """Why the blocks cannot be run one by one."""
    unseen: tuple[str, ...] = ()
    """The linear layers that are not called, as their blocks read the weight itself: neither calibration nor PEFT can
    reach them."""
    shared: Mapping[str, str] = field(default_factory=dict)
    """A linear layer -> the first of the others that have the same weight."""
    unnamed: Mapping[str, str] = field(default_factory=dict)
    """A linear layer that has no tensor of its own in checkpoints of the class -> why; of a model that comes as codes,
    only where it has one all the same."""
    problems: tuple[str, ...] = ()
    """What the checkpoint's headers lack, or have in another shape than the modules."""
    dropped: tuple[LeftOut, ...] = ()
    """Parts of the checkpoint that the class has no place for: towers, further heads."""

    def to_json(self) -> str:
        """Return the layout as text, for `from_json`."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> ModelLayout:
        """Return the layout that `to_json` wrote.

        Raises:
            ValueError: when the text is not a layout of this version of sqft.
        """
        try:
            content: dict[str, Any] = {
                key: tuple(v) if isinstance(v, list) else v for key, v in json.loads(text).items()
            }
            content["linears"] = tuple(LinearShape(**linear) for linear in content["linears"])
            for parts in ("left_out", "dropped"):
                content[parts] = tuple(LeftOut(**part) for part in content[parts])
            return cls(**content)
        except (TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"not a layout: {error!r}") from None
