"""lm-eval's tasks. Everything that a number depends on is passed explicitly, and returned with the numbers."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any, Literal

import lm_eval
import numpy as np
import torch
from lm_eval.models.utils import resolve_max_length
from lm_eval.tasks import TaskManager
from transformers import GenerationConfig, PreTrainedModel

from sqft.errors import StageError
from sqft.modeling.evaluation.generation import eval_mode, finite, greedy
from sqft.modeling.evaluation.harness_model import HarnessModel
from sqft.utils.progress import Track

log = logging.getLogger("sqft")

BOOTSTRAP = 1000
"""Resamples for the standard errors that lm-eval cannot compute in closed form (F1, BLEU, a median; a mean
has a formula): they know that error to 1/sqrt(2 * 1000), about 2%. lm-eval's 100,000 take minutes for a third digit."""

SEED, ARRAY_SEED = 0, 1234
"""lm-eval's own seeds: of Python's generator, and of NumPy's, torch's and the few-shot examples'."""

UNVERSIONED = "Yaml"
"""What lm-eval gives for the version of a task whose file has none."""

CPU_BATCH = 8
"""The batch size that "auto" stands for on a CPU: lm-eval would fill the machine's memory to find one."""

BY_PRECEDENCE = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
LENGTHS = frozenset(BY_PRECEDENCE)
"""lm-eval's names for the most tokens of an answer; of several, it takes the first."""

DEFAULT_LENGTH = 256
"""The most tokens of an answer where neither the recipe nor the task says."""


@dataclass(frozen=True)
class TaskSettings:
    """How lm-eval asks, with its own names; they hold for all tasks of a run."""

    num_fewshot: int | None = None
    """Examples before each question; None: as many as each task's file says. A task whose file says 0 has none."""
    apply_chat_template: bool | str = False
    """Whether questions are asked through the model's chat template, or the name of one of several."""
    fewshot_as_multiturn: bool = True
    """Whether, under a chat template, the examples are turns of the conversation; otherwise they are one turn."""
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Further arguments of the chat template."""
    system_instruction: str | None = None
    """Stands before everything else."""
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """Settings of generation that replace those of a task's file."""
    add_bos_token: bool | None = None
    """Whether a text begins with the tokenizer's special tokens; None: as the tokenizer does it by itself, and never
    under a chat template, which writes them."""
    limit: int | None = None
    """Documents of each task; None: all."""
    batch_size: int | Literal["auto"] = 8
    """Texts at a time; "auto": as many as fit into the accelerator's memory."""
    log_samples: bool = False
    """Whether to return what was asked and answered."""


def lm_eval_tasks(
    model: PreTrainedModel,
    tokenizer: Any,
    names: Sequence[str],
    include_path: Path | None,
    settings: TaskSettings,
    track: Track,
) -> dict[str, Any]:
    """Run lm-eval.

    Returns `metrics` of each task, with standard errors where lm-eval has them; `tasks`, with the version of each, its
    number of examples before a question and of documents; `settings`, as they were used; and `samples` of each task.

    Args:
        model: on the device to run on.
        tokenizer: the model's.
        names: of lm-eval's tasks, or of those in `include_path`.
        include_path: a folder of more tasks.
        settings: how the tasks are asked.
        track: shows progress.

    Raises:
        StageError: when a task cannot be loaded or asked in this way, or logits are not finite.
    """
    with eval_mode(model), finite(model), greedy(model, tokenizer), _undisturbed(model):
        settings, loaded = ready_tasks(names, include_path, settings, tokenizer, model.config)
        if settings.batch_size == "auto" and model.device.type == "cpu":
            log.info('evaluate.batch_size: "auto" is %d on a CPU', CPU_BATCH)
            settings = replace(settings, batch_size=CPU_BATCH)
        template = settings.apply_chat_template
        several = isinstance(tokenizer.chat_template, dict)
        named = {"chat_template": template} if several and isinstance(template, str) else {}
        asked = HarnessModel(
            track,
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=settings.batch_size,
            add_bos_token=settings.add_bos_token,
            chat_template_args={**settings.chat_template_kwargs, **named},
        )
        with _warnings_logged():
            try:
                found = lm_eval.evaluate(
                    lm=asked,
                    task_dict=loaded,
                    limit=settings.limit,
                    bootstrap_iters=BOOTSTRAP,
                    log_samples=settings.log_samples,
                    system_instruction=settings.system_instruction,
                    apply_chat_template=bool(settings.apply_chat_template),
                    fewshot_as_multiturn=settings.fewshot_as_multiturn,
                )
            except (
                ValueError,
                AssertionError,
            ) as error:  # what a task, or `generate`, says to settings that do not fit it
                raise StageError(f"lm-eval: {error}") from error
    return {
        "metrics": {task: _metrics(entries) for task, entries in found["results"].items()},
        "tasks": {task: _facts(task, found) for task in loaded["tasks"]},
        "settings": {"lm_eval": lm_eval.__version__} | {name: getattr(settings, name) for name in _SHOWN},
        "samples": found.get("samples", {}),
    }


_SHOWN = [name for name in TaskSettings.__dataclass_fields__ if name not in ("num_fewshot", "limit", "log_samples")]
"""The settings that are returned: the others are in the facts of each task."""


def ready_tasks(
    names: Sequence[str], include_path: Path | None, settings: TaskSettings, tokenizer: Any, config: Any
) -> tuple[TaskSettings, dict[str, Any]]:
    """Return the settings with what they leave open decided, and tasks that ask by them.

    `config` is the model's: no weight is needed to find what cannot work. See `lm_eval_tasks` for the other arguments.

    Raises:
        StageError: naming a task that cannot be loaded, or the setting that it, or the model, cannot follow.
    """
    settings = _checked(settings, tokenizer)
    check_generation(settings.gen_kwargs)
    loaded = load_tasks(names, include_path)
    with _mute():
        window = resolve_max_length(config, tokenizer)
        for name, task in loaded["tasks"].items():
            _configure(task, settings)
            _check_task(name, task, window)
    return settings, loaded


def load_tasks(names: Sequence[str], include_path: Path | None) -> dict[str, Any]:
    """Load tasks with their data sets, which are downloaded unless they are in the cache of `datasets`.

    Raises:
        StageError: naming a task that cannot be loaded, its data set, and what to do.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with _mute():
        manager = _manager(names, include_path)
        for name in names:
            try:
                for part, content in manager.load([name]).items():
                    loaded[part] |= content
            except Exception as error:  # those of `datasets`, of the hub, of a task's own code
                raise StageError(_cannot_load(name, manager, error)) from error
    return loaded


def _manager(names: Sequence[str], include_path: Path | None) -> TaskManager:
    """Return what finds the tasks' files; reading all of lm-eval's takes seconds, and is left out where it can be."""
    if include_path is None:
        return _stock_tasks()
    own = TaskManager(include_path=str(include_path), include_defaults=False)
    if set(names) <= set(own.all_subtasks):
        return own
    # A group of one's own may hold tasks of lm-eval's.
    return TaskManager(include_path=str(include_path)) if set(names) & set(own.all_tasks) else _stock_tasks()


@cache
def _stock_tasks() -> TaskManager:
    return TaskManager()


def _cannot_load(name: str, manager: TaskManager, error: Exception) -> str:
    """Describe why a task could not be loaded, and what to do about it."""
    entry = manager.task_index.get(name)
    if entry is None:
        return f"evaluate.tasks: lm-eval has no task '{name}'; give your own with evaluate.include_path"
    source = (entry.cfg or {}).get("dataset_path")
    data = f" (data set {source})" if source else ""
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    remedy = "install that"
    if not isinstance(error, ImportError):
        remedy = (
            "check the network and HF_HUB_OFFLINE, run once where the data set can be downloaded, or name a copy of it "
            "in a task file of your own (evaluate.include_path)"
        )
    return f"evaluate.tasks: '{name}'{data} cannot be loaded: {reason}; {remedy}"


def _checked(settings: TaskSettings, tokenizer: Any) -> TaskSettings:
    """Return the settings with what they leave open decided.

    Raises:
        StageError: when the tokenizer cannot do what they ask for.
    """
    name = settings.apply_chat_template
    templates = tokenizer.chat_template or {}
    if isinstance(templates, str):
        templates = {"default": templates}
    if name and not templates:
        raise StageError("evaluate.apply_chat_template: the model has no chat template; set it to false")
    if isinstance(name, str) and name not in templates:
        has = ", ".join(sorted(templates))
        raise StageError(f"evaluate.apply_chat_template: the model has no chat template '{name}'; it has {has}")
    adds = bool(tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"][0])
    if settings.add_bos_token and not adds:
        raise StageError(
            "evaluate.add_bos_token: the model's tokenizer puts no token before a text; leave this out, or set "
            '"add_bos_token": true in its tokenizer_config.json'
        )
    if settings.add_bos_token is None:
        # A chat template writes every token itself, and what it writes is not begun with one in training either.
        settings = replace(settings, add_bos_token=adds and not settings.apply_chat_template)
    return settings


def _configure(task: Any, settings: TaskSettings) -> None:
    """Put the settings into a task, as lm-eval's own command does it."""
    if settings.gen_kwargs and task.get_config("output_type") == "generate_until":
        own, given = task.get_config("generation_kwargs") or {}, dict(settings.gen_kwargs)
        if LENGTHS & given.keys():  # one of them, which replaces the task's by whatever name
            own = {name: value for name, value in own.items() if name not in LENGTHS}
            given["max_gen_toks"] = given.pop(*LENGTHS & given.keys())
        task.set_config(key="generation_kwargs", value={**own, **given})
    shots = task.get_config("num_fewshot")
    if settings.num_fewshot is not None and shots != 0:
        task.set_config(key="num_fewshot", value=settings.num_fewshot)
    elif shots is None:
        task.set_config(key="num_fewshot", value=0)
    task.set_fewshot_seed(seed=ARRAY_SEED)


def check_generation(gen_kwargs: Mapping[str, Any]) -> None:
    """Check that `generate`, and lm-eval, know settings of generation.

    Raises:
        StageError: naming one that they do not know or cannot follow.
    """
    known = {*GenerationConfig().to_dict(), "until", *LENGTHS}
    for name, value in gen_kwargs.items():
        place = f"evaluate.gen_kwargs.{name}"
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see transformers' GenerationConfig"
            raise StageError(f"{place}: there is no such setting of generation; {hint}")
        if name == "num_return_sequences" and value != 1:
            raise StageError(f"{place}: lm-eval takes one answer to a question; remove this")
        if name in LENGTHS and (not isinstance(value, int) or value < 1):
            raise StageError(f"{place}: {value!r} is no number of tokens; give one of 1 or more")
    if len(several := sorted(LENGTHS & gen_kwargs.keys())) > 1:
        raise StageError(f"evaluate.gen_kwargs: {' and '.join(several)} are names of one thing; keep one")


def _check_task(name: str, task: Any, window: int) -> None:
    """Check that a task's examples are there, and that its answers leave room for a question.

    Raises:
        StageError: naming the task.
    """
    shots, sampler = task.get_config("num_fewshot"), getattr(task, "sampler", None)
    if shots and sampler is not None:
        # lm-eval leaves out the question itself where it is among the examples.
        has = len(sampler.fewshot_docs()) - (task.fewshot_cfg.split == task.config.test_split)
        if shots > has:
            raise StageError(f"evaluate.num_fewshot: '{name}' has no {shots} examples; set it to {has} or less")
    if task.get_config("output_type") == "generate_until":
        given = task.get_config("generation_kwargs") or {}
        tokens = int(next((given[key] for key in BY_PRECEDENCE if given.get(key)), DEFAULT_LENGTH))
        if tokens >= window:
            raise StageError(
                f"evaluate.gen_kwargs.max_gen_toks: '{name}' generates up to {tokens} tokens, and the model's window "
                f"of {window} leaves no room for a question; set it lower"
            )


def _facts(task: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a reader of a task's numbers must know."""
    counts = found["n-samples"][task]
    return {
        "version": None if (version := found["versions"].get(task)) == UNVERSIONED else version,
        "num_fewshot": found["n-shot"].get(task),
        "documents": counts["effective"],
        "of": counts["original"],
    }


def _metrics(entries: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers among one task's results that are metrics: lm-eval names only those "metric,filter".

    "acc_stderr,none" becomes "acc_stderr", and "exact_match_stderr,strict" "exact_match,strict_stderr".
    """
    metrics = {}
    for key, value in entries.items():
        name, comma, kind = key.partition(",")
        if comma and isinstance(value, Real):  # an error that lm-eval cannot compute is "N/A"
            metric = name.removesuffix("_stderr")
            metrics[(metric if kind == "none" else f"{metric},{kind}") + name[len(metric) :]] = float(value)
    return metrics


@contextmanager
def _warnings_logged() -> Iterator[None]:
    """Log what lm-eval warns of (texts that are cut, a system turn that is left out), each kind once."""
    seen: dict[tuple[str, int], list[str]] = {}

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.setdefault((record.pathname, record.lineno), []).append(record.getMessage())

    logger, handler = logging.getLogger("lm_eval"), Collect(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        for first, *others in seen.values():
            more = f" ({len(others)} more of this kind)" if others else ""
            log.warning("lm-eval: %s%s", " ".join(first.split()), more)


@contextmanager
def _undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Seed as lm-eval does, and undo what it does to the process.

    It draws examples from Python's, NumPy's and torch's generators, prints and shows bars of its own, and forks a pool
    of processes to resample.
    """
    python, numbers, pool = random.getstate(), np.random.get_state(), os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices), _mute():
            random.seed(SEED)
            np.random.seed(ARRAY_SEED)
            torch.manual_seed(ARRAY_SEED)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
        os.environ.pop("DISABLE_MULTIPROC")
        if pool is not None:
            os.environ["DISABLE_MULTIPROC"] = pool


@contextmanager
def _mute() -> Iterator[None]:
    """Show nothing of what lm-eval and `datasets` print and draw; what they log is not touched."""
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield
