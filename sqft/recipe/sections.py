"""The sections of a recipe, one for each stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
)

from sqft.recipe.data import DataRef, DataRefs, TrainingData
from sqft.recipe.fields import Count, Fraction, Section

DTYPES = Literal["float32", "bfloat16", "float16"]


ANSWER = "what of the generation is compared: all of it, or a number in it"


class ComponentRef(Section):
    """A component by name, with its options still as the user wrote them."""

    name: str = Field(pattern=r"^([A-Za-z0-9._-]+/)?[a-z][a-z0-9-]*$", description='a name, or "plugin/name"')
    options: dict[str, Any] = Field(default_factory=dict)


def _short(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


Named = Annotated[ComponentRef, BeforeValidator(_short, json_schema_input_type=str | ComponentRef)]
"""A component: "wanda" is short for {"name": "wanda", "options": {}}."""


class Model(Section):
    """Where the pre-trained causal language model comes from."""

    path: str = Field(description="a folder in Hugging Face layout, a GGUF file, or a Hugging Face id")
    dtype: DTYPES = Field("float32", description="the precision weights are loaded and stored in")
    revision: str | None = Field(None, description="branch, tag or commit of a Hugging Face id")
    trust_remote_code: bool = Field(False, description="run Python code that the model's folder brings")


class Calibration(Section):
    """Text whose activations the scorers and quantizers see."""

    data: str = Field(description="a .jsonl file of {text} (or {prompt, completion}, {messages}), or a text file")
    samples: Count = Field(128, description="windows")
    length: Annotated[int, Field(ge=8)] = Field(2048, description="tokens a window")


class Sparsify(Section):
    """Which weights stay."""

    scorer: Named = Field(description="how a weight is scored")
    allocator: Named = Field(ComponentRef(name="uniform"), description="how much sparsity each layer gets")
    sparsity: Fraction = Field(0.5, description="fraction of weights set to zero")
    pattern: str = Field(
        "row",
        pattern=r"^(row|layer|[1-9][0-9]*:[1-9][0-9]*)$",
        description='which entries are compared: "row", "layer", or N:M (N kept of every M along a row)',
    )
    include: tuple[str, ...] = Field(("*",), description="glob patterns of the linear layers to prune")
    exclude: tuple[str, ...] = Field((), description="glob patterns of the linear layers to leave dense")

    @field_validator("pattern")
    @classmethod
    def _agrees_with_sparsity(cls, pattern: str, info: ValidationInfo) -> str:
        if ":" in pattern:
            kept, of = map(int, pattern.split(":"))
            if kept > of:
                raise ValueError(f"'{pattern}' keeps more than it has; write N:M with N <= M")
            sparsity = info.data.get("sparsity")  # absent when it is itself a mistake
            if sparsity is not None and abs((1 - kept / of) - sparsity) > 1e-4:
                raise ValueError(
                    f"'{pattern}' is a sparsity of {1 - kept / of:g}, not {sparsity:g}; "
                    f'set "sparsity": {1 - kept / of:g}'
                )
        return pattern


class Quantize(Section):
    """On which grid the weights lie."""

    quantizer: Named = Field(description="how a weight is put on a grid")
    include: tuple[str, ...] = Field(("*",), description="glob patterns of the linear layers to quantize")
    exclude: tuple[str, ...] = Field((), description="glob patterns of the linear layers to leave in float")


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab", "dvclive"]


class Finetune(Section):
    """How a low-rank delta is trained, and which merger defines the effective weight."""

    adapter: Named = Field(description="how the low-rank delta is made, and of which ranks")
    merger: Named = Field(description="the effective weight, trained through and stored by merge")
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        min_length=1,
        description="last names, or glob patterns of full names, of the linear layers to adapt",
    )
    base: Literal["floats", "codes"] = Field(
        "floats",
        description="what a merger starts from on a quantized base: the floats before quantization (paper §2.4), or "
        "what the codes stand for, which takes a fraction of the memory",
    )
    mask: Literal["base", "codes"] = Field(
        "base",
        description="what a merger keeps at zero: what the base does (a model that came as codes does not say, and "
        "keeps nothing), or every weight whose code stands for 0",
    )
    data: DataRefs = Field(description="one data set, or a list of several that are mixed")
    holdout: Fraction = Field(
        0.0,
        description="fraction of the records, drawn by the seed, that a search without data of its own evaluates on",
    )
    epochs: Annotated[float, Field(gt=0)] = Field(3.0, description="passes over the records")
    steps: Count | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: Count = Field(16, description="examples in a batch, of all processes together")
    gradient_accumulation: Count = Field(1, description="batches a step")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="AdamW's, at its highest")
    schedule: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "constant", "constant_with_warmup"
    ] = Field("linear", description="how the learning rate goes on after warm-up; transformers' names")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="steps in which the learning rate rises")
    warmup_ratio: Fraction = Field(0.0, description="fraction of all steps in which it rises, instead of warmup_steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="AdamW's; a grid's scales do not decay")
    adam_beta1: Fraction = Field(0.9, description="AdamW's decay of the mean of gradients")
    adam_beta2: Fraction = Field(0.999, description="AdamW's decay of the mean of their squares")
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(1e-8, description="AdamW's addition to the denominator")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="0 switches clipping off")
    max_length: Annotated[int, Field(ge=8)] = Field(
        512, description="tokens; longer examples are cut at the left, a longer {text} is several"
    )
    packing: bool = Field(
        False, description="put short examples into one row of max_length; none attends to another, batch_size is rows"
    )
    loss_on: Literal["completion", "all"] = Field("completion", description="which tokens are learnt; of a {text}, all")
    loss_chunk: Count | None = Field(
        None, description="labels whose logits are made at a time, and again in the backward pass; else all at once"
    )
    precision: DTYPES = Field(
        "float32", description="compute precision (autocast); float16 scales its losses and needs an accelerator"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None, description="of fine-tuning alone: first deltas, order of the data, ranks, dropout; else the recipe's"
    )
    validation: DataRef | None = Field(
        None, description="records whose mean loss a label is taken while training, at the largest ranks"
    )
    evaluate_every: Count = Field(50, description="optimizer steps between two looks at validation; the last counts")
    patience: Count | None = Field(
        None,
        description="looks at validation in a row without a lower loss that end training; keeps the best deltas",
    )
    save_every: Count = Field(50, description="optimizer steps between checkpoints")
    report_to: tuple[Tracker, ...] = Field((), description="trackers that get each step's loss; transformers' names")
    logging_dir: str | None = Field(None, description="folder of tensorboard's files; else logs/ in the artifact")

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @property
    def data_sets(self) -> dict[str, TrainingData]:
        """The data sets by the part that names them in a step's files: "data", or "data.0", "data.1", …"""
        if isinstance(self.data, TrainingData):
            return {"data": self.data}
        return {f"data.{index}": data for index, data in enumerate(self.data)}


class Search(Section):
    """Which sub-adapter is kept."""

    searcher: Named = Field(ComponentRef(name="heuristic"), description="how ranks are chosen")
    data: DataRef | None = Field(None, description="validation records; needed by searchers that evaluate")
    metric: Literal["exact_match", "loss"] = Field("exact_match", description="what a configuration is judged by")
    max_new_tokens: Count = Field(8, description="tokens generated for an answer")
    answer: Literal["text", "first_number", "last_number"] = Field("text", description=ANSWER)
    batch_size: Count = Field(64, description="prompts, or examples, at once")


class Merge(Section):
    """Fold the chosen sub-adapter into the base. The merger is the one trained with."""


class Export(Section):
    """Write the finished model for a runtime."""

    exporter: Named = Field(description="the format")


class Perplexity(Section):
    """Perplexity of a text, in windows that do not overlap."""

    text: str = Field(description="a text file that nothing was trained or calibrated on")
    tokens: Annotated[int, Field(ge=2)] | None = Field(None, description="take only the first so many tokens")
    length: Annotated[int, Field(ge=2)] = Field(1024, description="tokens a window")


class ExactMatch(Section):
    """Greedy generation from each prompt, compared with its completion."""

    data: DataRef = Field(description="records with a prompt and a completion that nothing was trained on")
    max_new_tokens: Count = Field(8, description="tokens generated for an answer")
    answer: Literal["text", "first_number", "last_number"] = Field("text", description=ANSWER)
    batch_size: Count = Field(64, description="prompts at once")


class Evaluate(Section):
    """What is measured, and of which configurations."""

    of: tuple[str, ...] = Field(
        ("merge",),
        min_length=1,
        description='"model", "sparsify", "quantize", "finetune:NAME" (a searcher that needs no evaluation), "search", '
        '"merge"',
    )
    perplexity: Perplexity | None = Field(None, description="how well a text is predicted")
    exact_match: ExactMatch | None = Field(None, description="how often the answer is the right one")
    tasks: tuple[str, ...] = Field((), description="lm-eval tasks by name")

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [task for index, task in enumerate(tasks) if task in tasks[:index]]:
            raise ValueError(f"'{twice[0]}' stands twice")
        return tasks

    include_path: str | None = Field(None, description="folder of lm-eval task files")
    limit: Count | None = Field(None, description="documents of each lm-eval task")
    batch_size: Count = Field(8, description="lm-eval's batch size")
