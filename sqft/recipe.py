"""The recipe: what is wanted, in the user's words.

Frozen, every key known, every number in a range. It names components and files and knows no
plugin: the options of a component stay raw here, and the plan validates them against the class
that the registry has for the name.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from sqft.errors import Problem, RecipeError, SqftError
from sqft.mistakes import brief, problems_of, without_mistakes

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Count = Annotated[int, Field(ge=1)]
DTYPES = Literal["float32", "bfloat16", "float16"]


class Section(BaseModel):
    """A part of a recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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


class Data(Section):
    """Records of {prompt, completion}, {messages} or {text}, one JSON object a line."""

    path: str
    limit: Count | None = Field(None, description="take only the first so many records")


def _short_data(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


DataRef = Annotated[Data, BeforeValidator(_short_data, json_schema_input_type=str | Data)]


Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "clearml", "swanlab", "dvclive"]


class Finetune(Section):
    """How a low-rank delta is trained, and which merger defines the effective weight."""

    adapter: Named
    merger: Named
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
    data: DataRef
    epochs: Annotated[float, Field(gt=0)] = 3.0
    steps: Count | None = Field(None, description="optimizer steps; overrides epochs")
    batch_size: Count = Field(16, description="examples in a batch, of all processes together")
    gradient_accumulation: Count = Field(1, description="batches a step")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
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
    loss_on: Literal["completion", "all"] = "completion"
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


class Search(Section):
    """Which sub-adapter is kept."""

    searcher: Named = ComponentRef(name="heuristic")
    data: DataRef | None = Field(None, description="validation records; needed by searchers that evaluate")
    metric: Literal["exact_match", "loss"] = "exact_match"
    max_new_tokens: Count = 8
    answer: Literal["text", "first_number", "last_number"] = "text"
    batch_size: Count = 64


class Merge(Section):
    """Fold the chosen sub-adapter into the base. The merger is the one trained with."""


class Export(Section):
    """Write the finished model for a runtime."""

    exporter: Named


class Perplexity(Section):
    """Perplexity of a text, in windows that do not overlap."""

    text: str
    tokens: Annotated[int, Field(ge=2)] | None = Field(None, description="take only the first so many tokens")
    length: Annotated[int, Field(ge=2)] = Field(1024, description="tokens a window")


class ExactMatch(Section):
    """Greedy generation from each prompt, compared with its completion."""

    data: DataRef
    max_new_tokens: Count = 8
    answer: Literal["text", "first_number", "last_number"] = Field(
        "text", description="what of the generation is compared: all of it, or a number in it"
    )
    batch_size: Count = 64


class Evaluate(Section):
    """What is measured, and of which configurations."""

    of: tuple[str, ...] = Field(
        ("merge",),
        min_length=1,
        description='"model", "sparsify", "quantize", "finetune:NAME" (a searcher that needs no evaluation), "search", '
        '"merge"',
    )
    perplexity: Perplexity | None = None
    exact_match: ExactMatch | None = None
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


class Recipe(Section):
    """A whole recipe. Sections that are left out are steps that are not taken."""

    schema_: Literal[1] = Field(1, alias="schema", description="version of the recipe's words")
    json_schema: str | None = Field(None, alias="$schema", description="where `sqft schema` was stored, for editors")
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="names the run's folder, nothing else")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="all randomness comes from it")
    model: Model
    calibration: Calibration | None = None
    sparsify: Sparsify | None = None
    quantize: Quantize | None = None
    finetune: Finetune | None = None
    search: Search | None = None
    merge: Merge | None = None
    export: tuple[Export, ...] = ()
    evaluate: Evaluate | None = None

    _folder: Path = PrivateAttr(default_factory=Path.cwd)
    _source: str = PrivateAttr(default="recipe")

    @property
    def folder(self) -> Path:
        """The folder that relative paths are resolved against: the recipe's own."""
        return self._folder

    @property
    def source(self) -> str:
        """The recipe's file, for messages."""
        return self._source

    def resolve(self, path: str) -> Path:
        """A path of the recipe as a path of this machine.

        Raises:
            SqftError: when no path can be made of it (a NUL, the home of a user who is none, a name too long).
        """
        try:
            whole = (self._folder / Path(path).expanduser()).resolve()
            whole.exists()
        except (OSError, RuntimeError, ValueError) as error:
            raise SqftError(f"{brief(path)} is no path on this machine: {error}") from None
        return whole

    @classmethod
    def load(cls, path: str | Path, changes: Sequence[str] = ()) -> Recipe:
        """Read a recipe file; each change is "path=value" with dots ("sparsify.sparsity=0.6").

        Raises:
            RecipeError: with every mistake and its path in the file.
        """
        path = Path(path)
        raw = read_json(path)
        for change in changes:
            _apply(raw, change, str(path))
        return cls.parse(raw, folder=path.resolve().parent, source=str(path))

    @classmethod
    def parse(cls, raw: object, folder: Path | None = None, source: str = "recipe") -> Recipe:
        """A recipe from plain data.

        Raises:
            RecipeError: with every mistake and its path.
        """
        if not isinstance(raw, dict):
            raise RecipeError([Problem("", f"expected a JSON object, found {type(raw).__name__}")], source)
        try:
            return cls.model_validate(raw)._at(folder, source)
        except ValidationError as error:
            rest = without_mistakes(cls, raw)
            raise RecipeError(problems_of(error, cls), source, rest and rest._at(folder, source)) from None

    def _at(self, folder: Path | None, source: str) -> Recipe:
        self._folder = (folder or Path.cwd()).resolve()
        self._source = source
        return self


def read_json(path: Path) -> Any:
    """A JSON file, strictly: no duplicate keys, no NaN.

    Raises:
        RecipeError: naming the file and the place in it.
    """
    try:
        return json.loads(path.read_text("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except OSError as error:
        raise RecipeError([Problem("", f"cannot be read: {error.strerror}")], str(path)) from None
    except UnicodeDecodeError:
        raise RecipeError([Problem("", "is not UTF-8 text; save it as UTF-8")], str(path)) from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise RecipeError([Problem(place, f"not valid JSON: {error.msg}")], str(path)) from None
    except ValueError as error:
        raise RecipeError([Problem("", str(error))], str(path)) from None
    except RecursionError:
        raise RecipeError([Problem("", "nested too deeply to be a recipe")], str(path)) from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    for key, value in pairs:
        if key in seen:
            raise ValueError(f"the key '{key}' stands twice in one object; keep one")
        seen[key] = value
    return seen


def _no_constant(word: str) -> Any:
    raise ValueError(f"{word} is not a number JSON has; write a finite number")


def _apply(raw: Any, change: str, source: str) -> None:
    """Put one `--set path=value` into plain data; the value is JSON, or else text."""
    path, equals, text = change.partition("=")
    if not equals or not path:
        raise RecipeError([Problem("", f"--set takes path=value, found {change!r}")], source)
    try:
        value = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except ValueError:
        value = text
    *parents, last = path.split(".")
    here = raw
    for depth, part in enumerate(parents):
        try:
            if isinstance(here, list):
                here = here[int(part)]
                continue
            if isinstance(here.get(part), str):  # the short forms grow into what they are short for
                here[part] = {"path" if part in ("data", "validation") else "name": here[part]}
            here = here.setdefault(part, {})
        except (AttributeError, IndexError, ValueError):
            where = ".".join(parents[: depth + 1])
            raise RecipeError([Problem(where, f"--set {change}: there is no such place")], source) from None
    if isinstance(here, list) and last.isdigit() and int(last) < len(here):
        here[int(last)] = value
    elif isinstance(here, dict):
        here[last] = value
    else:
        raise RecipeError([Problem(path, f"--set {change}: there is no such place")], source)
