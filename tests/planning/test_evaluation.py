"""What `evaluate` asks for: tasks that there are, in the form in which the model was trained."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

from sqft import Orchestrator, Recipe, Registry
from sqft.checkpoints.chat_template import StoredTemplate
from sqft.planning.conversations import ConversationCheck
from sqft.planning.evaluation import check_tasks, check_template
from sqft.recipe.sections import Evaluate
from tests.conftest import write_jsonl


def said(include_path: Path | None = None, **settings: Any) -> list[str]:
    return [str(problem) for problem in check_tasks(Evaluate(**settings), include_path)]


def test_tasks_that_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks, groups and tags of lm-eval, and one of a folder; known without lm-eval reading its files."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "own.yaml").write_text('"task": "mine"\n')
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    assert said(tmp_path, tasks=["arc_easy", "mmlu", "ai2_arc", "mine"]) == []
    assert said() == []


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["two", "all"])
def test_a_task_that_there_is_not(whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is named with what comes close; a word that a file merely mentions is none. Here lm-eval has two tasks, as
    it takes long to read all of its own."""
    if not whole:
        monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        (tmp_path / "arc.yaml").write_text("task: arc_easy\n")
    (tmp_path / "own.yaml").write_text("task: my_sums\ndescription: |\n  task of arc_eazy\n")
    first, second, third = said(tmp_path, tasks=["arc_eazy", "arc_easy", "my_sum", "nothing-like-any"])
    assert first.startswith(
        f"evaluate.tasks.0: lm-eval has no task 'arc_eazy', nor has {tmp_path}; did you mean arc_easy"
    )
    assert "evaluate.tasks.2" in second and "did you mean my_sums" in second
    assert third.startswith("evaluate.tasks.3") and third.endswith("; give your own with evaluate.include_path")


def templates(**sources: str) -> ConversationCheck:
    return ConversationCheck(StoredTemplate(sources, {}, ()))


def asked(conversations: ConversationCheck | None, **settings: Any) -> list[str]:
    return [str(problem) for problem in check_template(Evaluate(tasks=("arc_easy",), **settings), conversations)]


@pytest.mark.parametrize("option", [{"chat_template_kwargs": {"a": 1}}, {"fewshot_as_multiturn": False}], ids=str)
def test_options_of_a_template_that_is_not_applied(option: dict[str, Any]) -> None:
    (problem,) = asked(None, **option)
    assert problem == f"evaluate.{next(iter(option))}: has no effect without a chat template; set apply_chat_template"
    assert asked(None, **option, apply_chat_template=True) == []


def test_a_template_that_the_model_has_not() -> None:
    """None at all, none of that name, or one that does not read an argument."""
    several = templates(default="{{ messages }}{{ thinks }}", tool_use="{{ messages }}")
    assert asked(several, apply_chat_template=True) == asked(several, apply_chat_template="tool_use") == []
    assert asked(templates()) == asked(None, apply_chat_template="unknown") == []
    (none,) = asked(templates(), apply_chat_template=True)
    assert none == "evaluate.apply_chat_template: the model has no chat template; set it to false"
    (other,) = asked(several, apply_chat_template="rag")
    assert other.endswith("the model has no chat template 'rag'; it has default, tool_use")
    (argument,) = asked(several, apply_chat_template=True, chat_template_kwargs={"think": 1, "thinks": 2})
    assert argument == "evaluate.chat_template_kwargs: the chat template has no argument 'think'; it reads thinks"


def test_a_system_turn_that_the_template_refuses_or_hides() -> None:
    """lm-eval would leave it out without a word."""
    shows = "{% for m in messages %}{{ m.content }}{% endfor %}"
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + shows
    several = templates(default=shows, strict=refuses, deaf="{{ messages[-1].content }}")
    assert asked(several, apply_chat_template=True, system_instruction="Be brief") == []
    for name, reason in (("strict", "no system"), ("deaf", "it does not show it")):
        assert asked(several, apply_chat_template=name) == []
        (problem,) = asked(several, apply_chat_template=name, system_instruction="Be brief")
        assert problem.startswith("evaluate.system_instruction: the chat template takes no system turn (")
        assert reason in problem


@pytest.mark.parametrize("option", [{"apply_chat_template": True}, {"limit": 3}], ids=str)
def test_options_of_tasks_that_there_are_not(option: dict[str, Any]) -> None:
    (problem,) = map(str, check_template(Evaluate(**option), None))
    assert problem == f"evaluate.{next(iter(option))}: has no effect without tasks; name some, or remove this"


@pytest.mark.parametrize(("trained", "notes"), [({}, 2), ({"enable_thinking": False}, 0)], ids=str)
def test_the_template_is_given_other_arguments_than_in_training(
    trained: dict[str, Any], notes: int, raw: dict[str, Any], registry: Registry, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(raw["model"]["path"], model)
    template = (model / "chat_template.jinja").read_text() + "{{ '' if enable_thinking else '' }}"
    (model / "chat_template.jinja").write_text(template)
    file = str(write_jsonl(tmp_path / "chats.jsonl", [CHAT] * 3))
    asked = {"chat_template_kwargs": {"enable_thinking": False}}
    raw["model"]["path"] = str(model)
    raw["finetune"]["data"] = {"path": file, "chat_template_kwargs": trained}
    raw["search"] |= {"data": {"path": file, "chat_template_kwargs": trained}, "metric": "exact_match"}
    raw["evaluate"] = {"of": ["merge"], "tasks": ["arc_easy"], "apply_chat_template": True, **asked}
    raw["evaluate"]["exact_match"] = {"data": {"path": file, **asked}}
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    found = [
        note for note in plan.notes if 'the chat template is given {"enable_thinking": false} here, and {}' in note
    ]
    assert len(found) == notes


CHAT = {"messages": [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]}
PLAIN = {"prompt": "1+1=", "completion": "2"}
TEXT = {"text": "1+1=2"}
TO_CHATS = (
    "evaluate.apply_chat_template: the model is trained on conversations",
    "evaluate.exact_match.data: has prompts",
)
TO_PROMPTS = (
    "evaluate.apply_chat_template: the model is trained on prompts",
    "evaluate.exact_match.data: has conversations",
)


@pytest.mark.parametrize(
    ("training", "test", "template", "of", "notes"),
    [
        ([CHAT], PLAIN, False, "merge", (*TO_CHATS, "search.data: has prompts")),
        ([CHAT, CHAT], PLAIN, False, "finetune:maximal", (*TO_CHATS, "search.data: has prompts")),
        ([CHAT], PLAIN, False, "model", ("search.data: has prompts",)),
        ([CHAT], CHAT, True, "merge", ()),
        ([CHAT, PLAIN], PLAIN, False, "merge", ()),
        ([PLAIN], CHAT, True, "search", (*TO_PROMPTS, "search.data: has conversations")),
        ([PLAIN], PLAIN, False, "merge", ()),
        ([TEXT], CHAT, True, "merge", ()),
        ([CHAT, TEXT], PLAIN, False, "merge", (*TO_CHATS, "search.data: has prompts")),
        ([PLAIN, TEXT], CHAT, True, "search", (*TO_PROMPTS, "search.data: has conversations")),
    ],
)
def test_notes_on_chats(
    training: list[dict[str, Any]],
    test: dict[str, Any],
    template: bool,
    of: str,
    notes: tuple[str, ...],
    raw: dict[str, Any],
    registry: Registry,
    tmp_path: Path,
) -> None:
    files = [write_jsonl(tmp_path / f"{index}.jsonl", [record] * 3) for index, record in enumerate([*training, test])]
    raw["finetune"]["data"] = [str(file) for file in files[:-1]]
    raw["search"] |= {"data": str(files[-1]), "metric": "exact_match"}
    raw["evaluate"] = {"of": [of], "exact_match": {"data": str(files[-1])}, "tasks": ["arc_easy"]}
    raw["evaluate"]["apply_chat_template"] = template
    plan = Orchestrator(registry, tmp_path / "store").plan(Recipe.parse(raw))
    found = [note for note in plan.notes if "the model is trained on" in note]
    assert len(found) == len(notes) and all(any(note.startswith(start) for note in found) for start in notes)


def test_notes_on_records_that_are_known(raw: dict[str, Any], registry: Registry, tmp_path: Path) -> None:
    sums = [{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(12)]
    parts = {"train": sums[:6], "validation": sums[4:9], "test": sums[8:], "other": sums[10:]}
    files = {name: str(write_jsonl(tmp_path / f"{name}.jsonl", records)) for name, records in parts.items()}

    def notes(test: str, of: str = "merge") -> list[str]:
        raw["finetune"]["data"], raw["search"]["data"] = files["train"], files["validation"]
        raw["evaluate"] = {"of": [of], "exact_match": {"data": files[test]}}
        return [note for note in orchestrator.plan(Recipe.parse(raw)).notes if " also " in note]

    orchestrator = Orchestrator(registry, tmp_path / "store")
    end = "; use others, to see what the model can do beyond them"
    search = f"search.data: 2 of its 5 records also are trained on{end}"
    chosen = "evaluate.exact_match.data: 1 of its 4 records also choose the ranks in the search" + end
    assert notes("test") == [search, chosen] and notes("other") == notes("test", "sparsify") == [search]
    assert notes("train") == [
        search,
        f"evaluate.exact_match.data: its records also are trained on{end}",
        f"evaluate.exact_match.data: 2 of its 6 records also choose the ranks in the search{end}",
    ]
