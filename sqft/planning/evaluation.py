"""Check what `evaluate` asks for: are there such tasks, and is the model asked as it was trained? No torch."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sqft.data.chat_template import ChatTemplate
from sqft.data.overlap import RUN, shared_records, shared_runs
from sqft.data.records import records_of
from sqft.errors import DataError, Problem
from sqft.planning.conversations import ConversationCheck
from sqft.planning.plan import Step
from sqft.planning.resolution import Resolver
from sqft.recipe.data import Data
from sqft.recipe.measures import Perplexity
from sqft.recipe.sections import Calibration, Evaluate, Finetune, Search

NAMED = re.compile(rb"""^\s*(?:-\s+|["']?(?:task|group|tag)["']?\s*:\s*)["']?([^\s"'#]+)""", re.M)
"""The name that a line of a task file gives, or lists: of a task, a group or a tag."""

OF_TASKS = (
    "include_path",
    "limit",
    "num_fewshot",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "chat_template_kwargs",
    "system_instruction",
    "gen_kwargs",
    "add_bos_token",
    "log_samples",
)
"""Options of lm-eval's tasks alone."""

TUNED = ("search", "merge", "finetune")
"""Stages that leave a tuned model, by which an entry of `evaluate.of` begins."""

SHARED = 0.01
"""Share of a text's runs of words in another one from which on both are taken to come from one source."""

Notes = Iterator[tuple[str, str]]
"""Pairs of a place in the recipe and what there is to say about it."""


def measures_tuned(section: Evaluate) -> bool:
    """Return whether a tuned model is among what is measured."""
    return any(name.startswith(TUNED) for name in section.of)


def check_tasks(section: Evaluate, include_path: Path | None) -> Iterator[Problem]:
    """Check that lm-eval, or a folder of task files, has every task that is named.

    All files are looked through for a name, which is fast. Only lm-eval itself, which takes seconds to read them,
    refuses one.
    """
    mentioned = _mentioned(include_path) if section.tasks else set()
    if set(section.tasks) <= mentioned:
        return
    from lm_eval.tasks import TaskManager

    known = TaskManager(include_path=str(include_path) if include_path else None).all_tasks
    for index, task in enumerate(section.tasks):
        if task not in known:
            where = f", nor has {include_path}" if include_path else ""
            close = difflib.get_close_matches(task, known, n=3, cutoff=0.75)
            hint = f"did you mean {' or '.join(close)}?" if close else "give your own with evaluate.include_path"
            yield Problem(f"evaluate.tasks.{index}", f"lm-eval has no task '{task}'{where}; {hint}")


def texts_within_window(section: Evaluate, files: Mapping[str, Path], resolver: Resolver) -> Evaluate:
    """Return the section with windows of each text no longer than the model's; a text may be listed once."""
    shorter: list[Perplexity] = []
    for role, text in section.texts.items():
        place = f"evaluate.{role}".removesuffix(".text")
        shorter.append(resolver.within_window(text, "length", place))
        if (first := next(other for other in section.texts if files[other] == files[role])) != role:
            resolver.report(f"{place}.text", f"is the file of evaluate.{first}, too; name it once")
    several = isinstance(section.perplexity, tuple)
    return section.model_copy(update={"perplexity": tuple(shorter) if several else next(iter(shorter), None)})


def notes_on_seen_text(
    section: Evaluate, files: Mapping[str, Path], steps: Mapping[str, Step], calibration: Calibration | None
) -> Notes:
    """Note where a text whose perplexity is measured has much word for word of what calibration or training sees.

    Args:
        section: what is measured.
        files: its files, by role.
        steps: those planned so far.
        calibration: the recipe's section; None when it has none.
    """
    seen: list[tuple[Path, Data, str]] = []
    read = next((step.files["calibration"] for step in steps.values() if "calibration" in step.files), None)
    if read and calibration:
        seen.append((read, calibration.data, "calibration sees: its perplexity flatters what fits that text"))
    if "finetune" in steps and measures_tuned(section):
        trained = "training sees: after tuning, its perplexity is that of known text"
        seen += [(path, data, trained) for path, data in _training_data(steps["finetune"])]
    texts = [(files[role], text.tokens) for role, text in section.texts.items()]
    for path, data, why in seen if texts else ():
        try:
            shares = shared_runs(texts, path, data)
        except (DataError, OSError):
            continue  # the stage that reads it says so
        for role, share in zip(section.texts, shares, strict=True):
            if share >= SHARED:
                yield (
                    f"evaluate.{role}",
                    f"{share:.0%} of its runs of {RUN} words occur in {Path(data.file or data.path).name}, too, which "
                    f"{why}; measure another text beside it",
                )


def notes_on_known_records(place: str, asked: tuple[Path, Data], steps: Mapping[str, Step]) -> Notes:
    """Note where records that are asked are among those that the model is trained on, or that chose its ranks.

    Args:
        place: the data set's, in the recipe.
        asked: the data set: its file, and how it is read.
        steps: those planned so far.
    """
    known = {"are trained on": _training_data(steps["finetune"])} if "finetune" in steps else {}
    if "search" in steps and (chosen := steps["search"].files.get("data")):
        section = steps["search"].section
        assert isinstance(section, Search) and section.data
        known["choose the ranks in the search"] = [(chosen, section.data)]
    for what, others in known.items():
        try:
            shared, total = shared_records(asked, others)
        except (DataError, OSError):
            continue  # the stage that reads it says so
        if shared:
            part = "its records" if shared == total else f"{shared:,} of its {total:,} records"
            yield place, f"{part} also {what}; use others, to see what the model can do beyond them"


def check_template(section: Evaluate, conversations: ConversationCheck | None) -> Iterator[Problem]:
    """Check that lm-eval can ask through the chat template, if it is to, and otherwise that no option is for that.

    Args:
        section: what is measured.
        conversations: knows the model's chat template; None when only its tokenizer does.
    """
    template, place = section.apply_chat_template, "evaluate.apply_chat_template"
    if not section.tasks:
        for name in OF_TASKS:
            if getattr(section, name) != type(section).model_fields[name].get_default(call_default_factory=True):
                yield Problem(f"evaluate.{name}", "has no effect without tasks; name some, or remove this")
        return
    if not template:
        for name, given in (
            ("chat_template_kwargs", section.chat_template_kwargs),
            ("fewshot_as_multiturn", not section.fewshot_as_multiturn),
        ):
            if given:
                yield Problem(f"evaluate.{name}", "has no effect without a chat template; set apply_chat_template")
        return
    if conversations is None:
        return
    names = sorted(conversations.template.sources)
    if not names:
        yield Problem(place, "the model has no chat template; set it to false")
    elif isinstance(template, str) and template not in names:
        yield Problem(place, f"the model has no chat template '{template}'; it has {', '.join(names)}")
    else:
        try:
            conversations.check_arguments(section.chat_template_kwargs)
        except DataError as error:
            yield Problem("evaluate.chat_template_kwargs", str(error))
            return
        yield from _check_system_turn(section, conversations.template)


def _check_system_turn(section: Evaluate, template: ChatTemplate) -> Iterator[Problem]:
    """Check that the template shows the system turn; lm-eval leaves out one that it refuses."""
    if not (text := section.system_instruction):
        return
    name = section.apply_chat_template if isinstance(section.apply_chat_template, str) else "default"
    if name not in template.sources:
        return
    chat = dataclasses.replace(template, sources={"default": template.sources[name]}).chat()
    turns = [{"role": role, "content": said} for role, said in (("system", text), ("user", "x"))]

    def prompt(messages: list[dict[str, str]]) -> str:
        return chat.prompt({"messages": messages, "chat_template_kwargs": section.chat_template_kwargs}, len(messages))

    try:
        prompt(turns[1:])
    except DataError:
        return  # that is not because of the system turn
    try:
        if text.strip() in prompt(turns):
            return
        reason = "it does not show it"
    except DataError as error:
        reason = str(error)
    yield Problem("evaluate.system_instruction", f"the chat template takes no system turn ({reason}); remove this")


def _mentioned(include_path: Path | None) -> set[str]:
    """Return the names that task files give or list."""
    return _named_by_lm_eval() | (_named_in(include_path) if include_path else set())


@cache
def _named_by_lm_eval() -> set[str]:
    package = find_spec("lm_eval")
    return _named_in(Path(package.origin).parent / "tasks") if package and package.origin else set()


def _named_in(folder: Path) -> set[str]:
    return {
        name.decode(errors="replace") for file in folder.rglob("*.yaml") for name in NAMED.findall(file.read_bytes())
    }


def notes_on_chats(
    section: Evaluate, files: Mapping[str, Path], steps: Mapping[str, Step], arguments: Mapping[str, Any]
) -> Notes:
    """Note where a tuned model is asked in another way than it was trained: with or without the chat template.

    Args:
        section: what is measured.
        files: its files, by role.
        steps: those planned so far.
        arguments: the model's own, for its chat template.
    """
    if "finetune" not in steps or not measures_tuned(section):
        return
    trained = _form_of_training(steps["finetune"], arguments)
    if section.tasks and trained.kind == "messages":
        given = {**arguments, **section.chat_template_kwargs}
        if not section.apply_chat_template:
            yield (
                "evaluate.apply_chat_template",
                "the model is trained on conversations, in its chat template, and lm-eval asks without it; such "
                "numbers say little of the model: set this to true",
            )
        elif given not in trained.arguments:
            yield "evaluate.chat_template_kwargs", _other_arguments(given, trained)
    if section.tasks and trained.kind == "prompt" and section.apply_chat_template:
        yield (
            "evaluate.apply_chat_template",
            "the model is trained on prompts without the chat template, and lm-eval asks through it; set this to "
            "false, or train on {messages}",
        )
    if match := section.exact_match:
        place = "evaluate.exact_match.data"
        yield from _notes_on_data(place, files.get("exact_match.data"), match.data, trained, arguments)


def notes_on_search(
    section: Search, files: Mapping[str, Path], steps: Mapping[str, Step], arguments: Mapping[str, Any]
) -> Notes:
    """Note where a search asks in another way than the model was trained.

    See `notes_on_chats` for the arguments.
    """
    if section.data:
        trained = _form_of_training(steps["finetune"], arguments)
        yield from _notes_on_data("search.data", files.get("data"), section.data, trained, arguments)


@dataclass(frozen=True)
class _Form:
    """What data sets hold, judged by the first record of each."""

    kind: str | None
    """"messages" or "prompt"; None when there are both, or neither. Plain text asks nothing, and does not count."""
    arguments: list[Mapping[str, Any]]
    """Those of the chat template, of each data set of conversations."""


def _notes_on_data(place: str, path: Path | None, data: Data, trained: _Form, arguments: Mapping[str, Any]) -> Notes:
    """Note that records are conversations and those of training are not, the other way round, or of other arguments."""
    asked = _form([(path, data)] if path else [], arguments)
    if trained.kind == "messages" and asked.kind == "prompt":
        yield (
            place,
            "has prompts, which are asked without the chat template, and the model is trained on conversations; use "
            "records of {messages} here, too",
        )
    elif trained.kind == "prompt" and asked.kind == "messages":
        yield (
            place,
            "has conversations, which are asked through the chat template, and the model is trained on prompts without "
            "it; use records of {prompt, completion} here, too",
        )
    elif trained.kind == asked.kind == "messages" and asked.arguments[0] not in trained.arguments:
        yield place, _other_arguments(asked.arguments[0], trained)


def _other_arguments(given: Mapping[str, Any], trained: _Form) -> str:
    """Say that the chat template gets other arguments than in training."""
    there = " or ".join(json.dumps(one) for one in trained.arguments)
    return (
        f"the chat template is given {json.dumps(dict(given))} here, and {there} where the model is trained on it; "
        "set model.chat_template_kwargs, which is for both"
    )


def _form_of_training(step: Step, arguments: Mapping[str, Any]) -> _Form:
    return _form(_training_data(step), arguments)


def _training_data(step: Step) -> list[tuple[Path, Data]]:
    assert isinstance(step.section, Finetune)
    return [(step.files[role], data) for role, data in step.section.data_sets.items()]


def _form(data_sets: Iterable[tuple[Path, Data]], arguments: Mapping[str, Any]) -> _Form:
    kinds, given = set(), []
    for path, data in data_sets:
        (record,) = records_of(path, data.model_copy(update={"limit": 1}), arguments)
        kinds |= {"messages", "prompt"} & record.keys()
        if "messages" in record:
            given.append(record.get("chat_template_kwargs") or {})
    return _Form(kinds.pop() if len(kinds) == 1 else None, given)
