"""Check what `evaluate` asks for: are there such tasks, and is the model asked as it was trained? No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from sqft.data.records import records_of
from sqft.errors import DataError, Problem
from sqft.planning.conversations import ConversationCheck
from sqft.planning.plan import Step
from sqft.recipe.data import Data
from sqft.recipe.sections import Evaluate, Finetune, Search

NAMED = re.compile(rb"""^\s*(?:-\s+|["']?(?:task|group|tag)["']?\s*:\s*)["']?([^\s"'#]+)""", re.M)
"""The name that a line of a task file gives, or lists: of a task, a group or a tag."""

TUNED = ("search", "merge", "finetune")
"""Stages that leave a tuned model, by which an entry of `evaluate.of` begins."""

Notes = Iterator[tuple[str, str]]
"""Pairs of a place in the recipe and what there is to say about it."""


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


def check_template(section: Evaluate, conversations: ConversationCheck | None) -> Iterator[Problem]:
    """Check that lm-eval can ask through the chat template, if it is to, and otherwise that no option is for that.

    Args:
        section: what is measured.
        conversations: knows the model's chat template; None when only its tokenizer does.
    """
    template, place = section.apply_chat_template, "evaluate.apply_chat_template"
    if not template:
        for name, given in (
            ("chat_template_kwargs", section.chat_template_kwargs),
            ("fewshot_as_multiturn", not section.fewshot_as_multiturn),
        ):
            if given:
                yield Problem(f"evaluate.{name}", "has no effect without a chat template; set apply_chat_template")
        return
    if conversations is None or not section.tasks:
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


def _mentioned(include_path: Path | None) -> set[str]:
    """Return the names that task files give or list."""
    package = find_spec("lm_eval")
    folders = [Path(package.origin).parent / "tasks"] if package and package.origin else []
    folders += [include_path] if include_path else []
    files = (file for folder in folders for file in folder.rglob("*.yaml"))
    return {name.decode(errors="replace") for file in files for name in NAMED.findall(file.read_bytes())}


def notes_on_chats(section: Evaluate, files: Mapping[str, Path], steps: Mapping[str, Step]) -> Notes:
    """Note where a tuned model is asked without the chat template that it was trained in, or the other way round.

    Args:
        section: what is measured.
        files: its files, by role.
        steps: those planned so far.
    """
    if "finetune" not in steps or not any(name.startswith(TUNED) for name in section.of):
        return
    trained = _form_of_training(steps["finetune"])
    if section.tasks and trained == "messages" and not section.apply_chat_template:
        yield (
            "evaluate.apply_chat_template",
            "the model is trained on conversations, in its chat template, and lm-eval asks without it; such numbers "
            "say little of the model: set this to true",
        )
    if section.tasks and trained == "prompt" and section.apply_chat_template:
        yield (
            "evaluate.apply_chat_template",
            "the model is trained on prompts without the chat template, and lm-eval asks through it; set this to "
            "false, or train on {messages}",
        )
    if match := section.exact_match:
        yield from _notes_on_data("evaluate.exact_match.data", files.get("exact_match.data"), match.data, trained)


def notes_on_search(section: Search, files: Mapping[str, Path], steps: Mapping[str, Step]) -> Notes:
    """Note where a search asks without the chat template that training uses, or the other way round.

    See `notes_on_chats` for the arguments.
    """
    if section.data:
        trained = _form_of_training(steps["finetune"])
        yield from _notes_on_data("search.data", files.get("data"), section.data, trained)


def _notes_on_data(place: str, path: Path | None, data: Data, trained: str | None) -> Notes:
    """Note that records are conversations and those of training are not, or the other way round."""
    form = _form([(path, data)]) if path else None
    if trained == "messages" and form == "prompt":
        yield (
            place,
            "has prompts, which are asked without the chat template, and the model is trained on conversations; use "
            "records of {messages} here, too",
        )
    elif trained == "prompt" and form == "messages":
        yield (
            place,
            "has conversations, which are asked through the chat template, and the model is trained on prompts without "
            "it; use records of {prompt, completion} here, too",
        )


def _form_of_training(step: Step) -> str | None:
    assert isinstance(step.section, Finetune)
    return _form((step.files[role], data) for role, data in step.section.data_sets.items())


def _form(data_sets: Iterable[tuple[Path, Data]]) -> str | None:
    """Return what all data sets hold, judged by the first record of each: "messages", "prompt" or "text".

    None when they differ.
    """
    forms = set()
    for path, data in data_sets:
        (record,) = records_of(path, data.model_copy(update={"limit": 1}))
        forms.add(next(form for form in ("messages", "prompt", "text") if form in record))
    return forms.pop() if len(forms) == 1 else None
