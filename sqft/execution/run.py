"""What a run leaves: an outcome for each step, and the folder of the result."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.errors import ArtifactError
from sqft.execution.report import flat_rows, table, title
from sqft.planning.plan import Plan, Step
from sqft.recipe.stages import STAGES
from sqft.store.artifacts import Artifact
from sqft.utils.text import html_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Outcome:
    """A step and the artifact it left."""

    step: Step
    artifact: Artifact

    def __repr__(self) -> str:
        return f"<Outcome {self.step.name}: {self.folder}>"

    @property
    def report(self) -> dict[str, Any]:
        """The numbers that the stage reported."""
        return self.artifact.report

    @property
    def folder(self) -> Path:
        """The artifact's folder."""
        return self.artifact.folder

    def load_model(self) -> PreTrainedModel:
        """Load the model that this step wrote.

        Raises:
            ArtifactError: when the step wrote none (an adapter, a rank configuration, a measurement).
        """
        from sqft.checkpoints.model_spec import ModelSpec
        from sqft.modeling.loading import load_model

        if not (self.folder / "model").is_dir():
            *makers, last = [stage.name for stage in STAGES if stage.makes_model]
            raise ArtifactError(f"step '{self.step.name}' wrote no model; {', '.join(makers)} and {last} do")
        return load_model(ModelSpec(self.folder / "model"))[0]


@dataclass(frozen=True)
class Run(Mapping[str, Outcome]):
    """What a run left, by step: `run["merge"].load_model()`."""

    plan: Plan
    folder: Path
    outcomes: dict[str, Outcome]
    report: dict[str, Any]

    def __getitem__(self, name: str) -> Outcome:
        return self.outcomes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.outcomes)

    def __len__(self) -> int:
        return len(self.outcomes)

    def rows(self) -> list[dict[str, Any]]:
        """Return a flat dict for each measured configuration: `pandas.DataFrame(run.rows())`."""
        return flat_rows(self.report)

    def __repr__(self) -> str:
        return f"<Run {self.folder}: {', '.join(self.outcomes) or 'nothing done'}>"

    def _repr_html_(self) -> str:
        """Return the table of results, as notebooks show it."""
        return html_table(title(self.report), *table(self.report))

    def result(self) -> Path | None:
        """Return the folder of the last model or adapter: exported, merged, adapter, or sparse model.

        None when the last step that was run leaves nothing to load: after `finetune` alone, no ranks are chosen.
        """
        made = [outcome for outcome in self.outcomes.values() if outcome.step.stage != "evaluate"]
        folders = [made[-1].folder / name for name in ("model", "adapter")] if made else []
        return next(filter(Path.is_dir, folders), None)

    def inputs(self, step: str) -> dict[str, Path]:
        """Return the artifact folders of a step's inputs, by role."""
        return {role: self[name].folder for role, name in self.plan.step(step).inputs.items()}


RESULT = "{result}"
"""Stands in a run's record for the folder of its result, which moves with the store."""


def loading_instructions(result: Path, run: Run) -> str:
    """Return code that loads a run's result from the folder `result`, a command that uses it, or why neither works."""
    if (result / "adapter_config.json").is_file():
        base = run.plan.adapter_base.model(run.inputs("search")).resolve()
        where = f'"{base.parent}", gguf_file="{base.name}"' if base.suffix == ".gguf" else f'"{base}"'
        trusted = ", trust_remote_code=True" if run.plan.recipe.model.trust_remote_code else ""
        model = f'AutoModelForCausalLM.from_pretrained({where}, dtype="auto"{trusted})'
        return (
            "from peft import PeftModel; from transformers import AutoModelForCausalLM\n"
            f'model = PeftModel.from_pretrained({model}, "{result}")'
        )
    config = result / "config.json"
    if config.is_file() and (settings := json.loads(config.read_text("utf-8")).get("quantization_config")):
        format = settings.get("quant_method")
        name, reader = ("GPTQ", "gptqmodel and optimum") if format == "gptq" else (format, format)
        return (
            f"a {name} checkpoint; with {reader} installed:\n"
            "from transformers import AutoModelForCausalLM\n"
            f'model = AutoModelForCausalLM.from_pretrained("{result}")'
        )
    if (result / "sqft_adapter.json").is_file():
        return 'this adapter acts only through its merger; add "merge": {} to the recipe to get a model'
    if file := next(result.glob("*.gguf"), None):
        return f'a GGUF file, for llama.cpp and programs made of it:\nllama-cli -m "{file}"'
    return (
        "from transformers import AutoModelForCausalLM\n"
        f'model = AutoModelForCausalLM.from_pretrained("{result}", dtype="auto")'
    )


def loading_template(result: Path, run: Run) -> str:
    """Return the instructions with `RESULT` in place of the folder."""
    folder = result.resolve()
    return loading_instructions(folder, run).replace(str(folder), RESULT)
