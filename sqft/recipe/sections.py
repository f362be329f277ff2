"""The sections of a recipe, one for each stage."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Discriminator,
    Field,
    PlainSerializer,
    PlainValidator,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from sqft.recipe.choices import OptimizerName, Schedule, Tracker
from sqft.recipe.data import CalibrationRef, DataRef, DataRefs, TemplateArguments, TrainingData
from sqft.recipe.fields import Count, Fraction, NoEffect, OutputPath, Section, ShortForm
from sqft.recipe.measures import Answer, ExactMatch, Perplexities, Perplexity, Tolerance
from sqft.recipe.teacher import TeacherRef
from sqft.types import InputPath, Pattern

DTYPES = Literal["float32", "bfloat16", "float16"]


class ComponentRef(Section):
    """A component by name, with its options still as the user wrote them."""

    name: str = Field(pattern=r"^([A-Za-z0-9._-]+/)?[a-z][a-z0-9-]*$", description='a name, or "plugin/name"')
    options: dict[str, Any] = Field(default_factory=dict)


Named = Annotated[ComponentRef, ShortForm("name")]
"""A component: "wanda" is short for {"name": "wanda", "options": {}}."""


class Model(Section):
    """Where the pre-trained causal language model comes from."""

    path: Annotated[str, InputPath(hub=True)] = Field(
        description="a folder in Hugging Face layout, a GGUF file, or a Hugging Face id"
    )
    dtype: Literal[DTYPES, "auto"] = Field(
        "float32",
        description='precision in which weights are loaded and stored, "auto" for that of the checkpoint\'s floats; '
        "weights outside the text model keep their own",
    )
    dequantize: bool = Field(
        False, description="load weights in MXFP4 or FP8 as floats; dtype is then bfloat16 unless it is given"
    )
    revision: str | None = Field(None, description="branch, tag or commit, if the path is a Hugging Face id")
    trust_remote_code: bool = Field(False, description="allow Python code from the model's folder to run")
    chat_template_kwargs: TemplateArguments = Field(
        default_factory=dict,
        description='arguments for the chat template wherever it is used, such as {"enable_thinking": false}',
    )

    @model_validator(mode="after")
    def _precision_of_packed_floats(self) -> Self:
        """Take bfloat16 for weights of four or eight bits, unless the recipe says otherwise."""
        if self.dequantize and "dtype" not in self.model_fields_set:
            vars(self)["dtype"] = "bfloat16"  # not as if the user had written it
        return self


class Calibration(Section):
    """Text whose activations the scorers and quantizers see."""

    data: CalibrationRef = Field(
        description="a file of records, a data set, or a text file. Take general text, of several kinds like those "
        "that the model was pretrained on, and not the task's: what fits one kind of text loses on others"
    )
    samples: Count = Field(128, description="number of windows")
    length: Annotated[int, Field(ge=8)] = Field(2048, description="tokens in each window")
    memory: Annotated[float, Field(gt=0), NoEffect()] = Field(
        4.0, description="GiB of the windows' hidden states that stay in memory; the others are in a file meanwhile"
    )

    @property
    def memory_bytes(self) -> int:
        """`memory` in bytes."""
        return int(self.memory * (1 << 30))


def _pattern(value: Any) -> Pattern:
    if isinstance(value, Pattern):
        return value
    if not isinstance(value, str):
        raise PydanticCustomError("string_type", "Input should be a valid string")
    return Pattern.parse(value)


PatternText = Annotated[
    Pattern,
    PlainValidator(_pattern),
    PlainSerializer(str, return_type=str),
    WithJsonSchema({"type": "string", "pattern": "^(row|layer|[1-9][0-9]*:[1-9][0-9]*)$"}),
]
"""A pattern, which a recipe writes as text."""


class Sparsify(Section):
    """Which weights are kept, and which are set to zero."""

    scorer: Named = Field(description="component that scores the weights; those with the lowest scores are pruned")
    allocator: Named = Field(
        ComponentRef(name="uniform"), description="component that decides how much sparsity each layer gets"
    )
    updater: Named | None = Field(
        None, description="component that changes the kept weights to make up for the pruned ones"
    )
    sparsity: Fraction = Field(
        0.5, description="fraction of weights set to zero; with N:M it is 1 - N / M, and may be left out"
    )
    pattern: PatternText = Field(
        Pattern("row"),
        description='which weights are compared: "row", "layer", or N:M (N of every M in a row are kept)',
        json_schema_extra={"default": "row"},
    )
    include: tuple[str, ...] = Field(("*",), description="glob patterns of the linear layers to prune")
    exclude: tuple[str, ...] = Field((), description="glob patterns of the linear layers to leave dense")

    @model_validator(mode="before")
    @classmethod
    def _sparsity_of_pattern(cls, content: Any) -> Any:
        """Fill in the sparsity that an N:M pattern gives."""
        if isinstance(content, dict) and "sparsity" not in content:
            try:
                sparsity = _pattern(content.get("pattern")).sparsity
            except ValueError:
                return content
            return content if sparsity is None else {**content, "sparsity": sparsity}
        return content

    @field_validator("pattern")
    @classmethod
    def _agrees_with_sparsity(cls, pattern: Pattern, info: ValidationInfo) -> Pattern:
        sparsity: float | None = info.data.get("sparsity")  # absent when it is itself a mistake
        if sparsity is not None and pattern.sparsity is not None and abs(pattern.sparsity - sparsity) > 1e-4:
            raise ValueError(
                f"'{pattern}' is a sparsity of {pattern.sparsity:g}, not {sparsity:g}; "
                f'set "sparsity": {pattern.sparsity:g}, or leave it out'
            )
        return pattern

    @model_validator(mode="after")
    def _derived_sparsity_is_not_stored(self) -> Self:
        """Count a sparsity that the pattern gives as left out: a stored recipe may be given another pattern."""
        if self.pattern.sparsity is not None:
            self.model_fields_set.discard("sparsity")
        return self


class Quantize(Section):
    """Store weights as codes on a low-precision grid."""

    quantizer: Named = Field(description="component that chooses the grid and the codes of each layer")
    include: tuple[str, ...] = Field(("*",), description="glob patterns of the linear layers to quantize")
    exclude: tuple[str, ...] = Field((), description="glob patterns of the linear layers to leave in float")
    keep_compensated: bool = Field(
        True,
        description="whether the floats that were rounded are kept beside the codes, a byte a weight, so that an "
        "adapter can start from them (finetune.base: compensated); false halves the step's disk at 4 bits",
    )


class Finetune(Section):
    """How low-rank adapters are trained, and which merger defines the effective weight."""

    adapter: Named = Field(description="component that makes the trainable matrices, and their ranks")
    merger: Named = Field(
        description="component that defines the effective weight, which training uses and the merge stores"
    )
    targets: tuple[str, ...] = Field(
        ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj"),
        min_length=1,
        description="last names, or glob patterns of full names, of the linear layers to adapt",
    )
    base: Literal["floats", "packed", "codes", "compensated"] = Field(
        "floats",
        description="what training starts from, and how it is in memory. floats: the base's, on a quantized base those "
        "from before quantization (paper §2.4); packed: a sparse base's floats without their zeros, the same numbers "
        "in less memory. On a quantized base also codes: the values that they stand for, in a fraction of the memory; "
        "and compensated: the floats that the quantizer rounded to them, kept as the codes and a byte for each weight",
    )
    mask: Literal["base", "codes"] = Field(
        "base",
        description="which weights must stay zero: those that the base's mask prunes (a GPTQ model from elsewhere has "
        "no mask), or every weight whose code means 0",
    )
    data: DataRefs = Field(description="training records: one data set, or a list of several that are mixed")
    holdout: Fraction = Field(
        0.0,
        description="fraction of the records to keep out of training, drawn by the seed; a search without data of its "
        "own uses them",
    )
    epochs: Annotated[float, Field(gt=0)] = Field(3.0, description="number of passes over the records")
    steps: Count | None = Field(None, description="number of optimizer steps, instead of epochs")
    batch_size: Count = Field(16, description="examples in a batch, for all processes together")
    gradient_accumulation: Count = Field(1, description="batches for each optimizer step")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in the backward pass: less memory, more time"
    )
    optimizer: OptimizerName = Field(
        "adamw_torch",
        description="with transformers' name; those with 8bit, 32bit or ademamix in it need the package bitsandbytes",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(3e-4, description="learning rate at its highest")
    learning_rate_ratio: Annotated[float, Field(gt=0, le=10_000)] = Field(
        1.0, description="B's learning rate, as a multiple of learning_rate (LoRA+)"
    )
    schedule: Schedule = Field(
        "linear", description="how the learning rate changes after warm-up, with transformers' names"
    )
    warmup_steps: Annotated[int, Field(ge=0)] = Field(0, description="number of steps in which the learning rate rises")
    warmup_ratio: Fraction = Field(0.0, description="fraction of all steps in which it rises, instead of warmup_steps")
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.0, description="weight decay; not for the scales of a grid")
    adam_beta1: Fraction = Field(0.9, description="decay rate for the mean of gradients (AdamW, AdEMAMix, Lion)")
    adam_beta2: Fraction = Field(
        0.999, description="decay rate for the mean of squared gradients (AdamW, AdEMAMix), or Lion's second one"
    )
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        1e-8, description="small constant in the denominator (AdamW, AdEMAMix)"
    )
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="gradients are clipped to this norm; 0 switches clipping off"
    )
    max_length: Annotated[int, Field(ge=8)] = Field(
        512, description="tokens in an example; for longer ones see truncation; a longer {text} becomes several"
    )
    truncation: Literal["left", "right", "drop"] = Field(
        "left",
        description="what becomes of a longer prompt and completion, or conversation. left: its beginning is cut; "
        "right: its end; drop: it is left out",
    )
    packing: bool = Field(
        False,
        description="put short examples into rows of max_length tokens; none sees another, batch_size is in rows",
    )
    loss_on: Literal["completion", "all"] = Field(
        "completion", description="tokens on which the loss is computed; for a {text} record, all"
    )
    loss_chunk: Count | None = Field(
        None, description="compute the logits of this many labels at a time, twice, to save memory; null: all at once"
    )
    teacher: TeacherRef | None = Field(
        None, description="model whose predictions are learnt beside the labels; null: only the labels are learnt"
    )
    precision: DTYPES = Field(
        "float32", description="precision of computation (autocast); float16 scales the loss and needs an accelerator"
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = Field(
        None,
        description="seed of fine-tuning alone (initial deltas, data order, ranks, dropout); null: the recipe's seed",
    )
    validation: DataRef | None = Field(
        None, description="records on which the mean loss per label is measured during training, at the largest ranks"
    )
    evaluate_every: Count = Field(
        50, description="optimizer steps between two validations; the last step always has one"
    )
    patience: Count | None = Field(
        None,
        description="end training after this many validations in a row without a lower loss, and keep the best deltas",
    )
    save_every: Annotated[Count, NoEffect()] = Field(50, description="optimizer steps between checkpoints")
    report_to: Annotated[tuple[Tracker, ...], NoEffect()] = Field(
        (), description="trackers that receive each step's loss, with transformers' names"
    )
    logging_dir: Annotated[str | None, OutputPath()] = Field(
        None, description="folder for TensorBoard's files; null: logs/ in the artifact"
    )

    @field_validator("report_to", mode="before")
    @classmethod
    def _one_tracker(cls, names: Any) -> Any:
        return (names,) if isinstance(names, str) else names

    @property
    def data_sets(self) -> dict[str, TrainingData]:
        """The data sets, by the key that a step's files have for them: "data", or "data.0", "data.1", …"""
        if isinstance(self.data, TrainingData):
            return {"data": self.data}
        return {f"data.{index}": data for index, data in enumerate(self.data)}


class Search(Section):
    """Choose the ranks, and with them the sub-adapter that is kept."""

    searcher: Named = Field(ComponentRef(name="heuristic"), description="component that chooses the rank configuration")
    data: DataRef | None = Field(None, description="validation records, for searchers that evaluate")
    metric: Literal["exact_match", "loss"] = Field(
        "exact_match", description="measure by which rank configurations are compared"
    )
    max_new_tokens: Count = Field(8, description="tokens generated for an answer")
    answer: Answer = "text"
    tolerance: Tolerance = 0.0
    batch_size: Count = Field(64, description="prompts, or examples, that are processed at once")


class Merge(Section):
    """Merge the chosen sub-adapter into the base, with the merger of `finetune`."""


class Export(Section):
    """Write the finished model in the format of another program."""

    exporter: Named = Field(description="component that writes the format")


def _kind(value: Any) -> str:
    return "@text" if isinstance(value, str) else "@other"


BatchSize = Annotated[Annotated[Count, Tag("@other")] | Annotated[Literal["auto"], Tag("@text")], Discriminator(_kind)]
SwitchOrName = Annotated[Annotated[bool, Tag("@other")] | Annotated[str, Tag("@text")], Discriminator(_kind)]
"""Either of two types; the tags are not part of a path in the recipe: `diagnostics` removes them."""


class Evaluate(Section):
    """What is measured, and for which configurations."""

    # NoEffect: each entry is a step of its own, whose fingerprint must not depend on the other entries.
    of: Annotated[tuple[str, ...], NoEffect()] = Field(
        ("merge",),
        min_length=1,
        description='what to measure: "model", "sparsify", "quantize", "finetune:NAME" (NAME is a searcher that '
        'needs no evaluation), "search", "merge"',
    )
    perplexity: Perplexities | None = Field(
        None, description="measure how well a text is predicted, or a list of several texts"
    )
    exact_match: ExactMatch | None = Field(None, description="measure how often the answer is right")
    adapter: Annotated[str | None, InputPath(folder=True, hub=True)] = Field(
        None,
        description="a PEFT adapter (LoRA) that acts on the model, as in stock peft: a folder, or a Hugging Face id; "
        'of is then ["model"]',
    )
    # Its files are what the result depends on.
    adapter_revision: Annotated[str | None, NoEffect()] = Field(
        None, description="branch, tag or commit, if the adapter is a Hugging Face id"
    )
    tasks: tuple[str, ...] = Field((), description="names of lm-eval tasks; the fields below are for all of them")

    @field_validator("tasks")
    @classmethod
    def _once(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        if twice := [task for index, task in enumerate(tasks) if task in tasks[:index]]:
            raise ValueError(f"'{twice[0]}' is listed twice; keep one")
        return tasks

    include_path: Annotated[str | None, InputPath(folder=True)] = Field(
        None, description="folder with task files for lm-eval"
    )
    limit: Count | None = Field(None, description="use only this many documents of each lm-eval task")
    batch_size: BatchSize = Field(
        8, description="lm-eval's batch size; \"auto\": as large as an accelerator's memory allows, 8 on a CPU"
    )
    num_fewshot: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="examples before each question; null: as many as the task's file says. A task whose file says 0 "
        "has none",
    )
    apply_chat_template: SwitchOrName = Field(
        False, description="ask through the model's chat template, or through the one of this name if it has several"
    )
    fewshot_as_multiturn: bool = Field(
        True, description="under a chat template, make each example a turn of its own; false: all are in one turn"
    )
    chat_template_kwargs: TemplateArguments = Field(
        default_factory=dict,
        description="arguments for the chat template in lm-eval's tasks; they replace the model's own",
    )
    system_instruction: str | None = Field(None, description="system turn, or text, that stands before everything else")
    gen_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of generation that replace those of the task's file, with lm-eval's names: "
        '{"max_gen_toks": 512}',
    )
    add_bos_token: bool | None = Field(
        None,
        description="begin each text with the tokenizer's special tokens; null: as the tokenizer does by itself, and "
        "not under a chat template, which writes them",
    )
    log_samples: bool = Field(False, description="store what was asked and answered: samples/TASK.jsonl")

    @property
    def texts(self) -> dict[str, Perplexity]:
        """The texts of `perplexity`, by the key that a step's files have for them: "perplexity.text", or
        "perplexity.0.text", "perplexity.1.text", …"""
        if isinstance(self.perplexity, tuple):
            return {f"perplexity.{index}.text": text for index, text in enumerate(self.perplexity)}
        return {"perplexity.text": self.perplexity} if self.perplexity else {}
