"""What lies under the adapters of a recipe: the one answer to where those weights are and of which kind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sqft.types import BaseKind


@dataclass(frozen=True)
class AdapterBase:
    """The model that adapters are trained on: one that a step of the recipe makes, or else the recipe's own.

    The methods take the artifact folders of a step's inputs by role, as `inputs` names them.

    Args:
        kind: dense or sparse floats, or codes; None only while planning, when the recipe's model was not found.
        source_path: the recipe's own model, a folder or a GGUF file.
        step: name of the step that makes the base; None when it is the recipe's own model.
        floats_step: name of the step that makes the float weights which `step` quantizes; None when `step` quantizes
            nothing, or quantizes the recipe's own model.
    """

    kind: BaseKind | None
    source_path: Path
    step: str | None = None
    floats_step: str | None = None

    @property
    def quantized(self) -> bool:
        """Whether codes lie under the adapters."""
        return self.kind is BaseKind.QUANTIZED

    @property
    def inputs(self) -> dict[str, str]:
        """The steps that a step on this base reads, by role, for `Step.inputs`."""
        roles = {"base": self.step, "floats": self.floats_step}
        return {role: step for role, step in roles.items() if step is not None}

    def model(self, folders: Mapping[str, Path]) -> Path:
        """Return the path of the base model, floats or codes."""
        return folders["base"] / "model" if self.step else self.source_path

    def floats(self, folders: Mapping[str, Path]) -> Path | None:
        """Return the path of the float model that was quantized; None when the base holds floats or came as codes."""
        if not (self.quantized and self.step):
            return None
        return folders["floats"] / "model" if self.floats_step else self.source_path

    def masks(self, folders: Mapping[str, Path]) -> Path | None:
        """Return the file of the masks that quantization kept; None when it kept none, as of a model that came so."""
        return folders["base"] / "masks.safetensors" if self.quantized and self.step else None

    def residuals(self, folders: Mapping[str, Path]) -> Path:
        """Return the file of what `quantize` kept of the floats that it rounded, beside the codes."""
        return folders["base"] / "compensated.safetensors"
