"""BuiltinTemplate templates ask what lm-eval's tasks ask, as the installed lm-eval defines them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import yaml
from lm_eval.utils import apply_template

from sqft.data.templates import TEMPLATES, mistake_in, render

TASKS = Path(lm_eval.__file__).parent / "tasks"
ARC = {"text": ["a bee", "the sea", "fog"], "label": ["A", "B", "C"]}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("gsm8k", "gsm8k/gsm8k.yaml", {"question": "How many?", "answer": "2 + 2\n#### 4"}),
    ("arc", "arc/arc_easy.yaml", {"question": "What hums?", "choices": ARC, "answerKey": "A"}),
    ("piqa", "piqa/piqa.yaml", {"goal": "Open it", "sol1": "push", "sol2": "pull", "label": 1}),
    ("openbookqa", "openbookqa/openbookqa.yaml", {"question_stem": "Rain is", "choices": ARC, "answerKey": " C"}),
    ("boolq", "super_glue/boolq/default.yaml", {"passage": "It is.", "question": "is it", "label": 1}),
]


def asked(task: dict[str, Any], row: dict[str, Any]) -> tuple[str, str]:
    """What lm-eval puts before the model, and the right answer after its delimiter."""

    def filled(entry: Any) -> Any:
        if isinstance(entry, str) and entry in row:  # a field by its name
            return row[entry]
        return apply_template(entry, row) if isinstance(entry, str) else entry

    text, target = filled(task["doc_to_text"]), filled(task["doc_to_target"])
    if "doc_to_choice" in task:
        choices = filled(task["doc_to_choice"])
        choices = yaml.safe_load(choices) if isinstance(choices, str) else choices
        target = choices[int(target)]
    return text, task.get("target_delimiter", " ") + target


@pytest.mark.parametrize(("name", "file", "row"), CASES, ids=[case[0] for case in CASES])
def test_the_words_are_those_of_lm_eval(name: str, file: str, row: dict[str, Any]) -> None:
    loader = yaml.SafeLoader
    loader.add_multi_constructor("!", lambda *_: None)
    task = yaml.load((TASKS / file).read_text(), loader)
    prompt, completion = asked(task, row)
    assert render(TEMPLATES[name], row) == {"prompt": prompt, "completion": completion}


@pytest.mark.parametrize("label", ["0", 1, "2"])
@pytest.mark.parametrize("after", ["how to swim [step] a pool. [title] go In.", "", "  THEN, she"])
def test_hellaswag_cleans_its_texts_as_lm_eval_does(label: str | int, after: str) -> None:
    from lm_eval.tasks.hellaswag.utils import process_docs

    row = {
        "activity_label": "Sports", "ctx_a": "[header] A title [title] Two  spaces [substeps] x.", "ctx_b": after,
        "endings": [" and  [unused] ends [title] here ", "[step] stops.", "Goes   on [a] [b]. "], "label": label,
    }  # fmt: skip
    (asks,) = process_docs(datasets.Dataset.from_list([row]))
    task = yaml.safe_load((TASKS / "hellaswag/hellaswag.yaml").read_text().replace("!function", ""))
    prompt, completion = asked(task, asks)
    assert asked(task, asks) == (asks["query"], " " + asks["choices"][int(label)])
    assert render(TEMPLATES["hellaswag"], row) == {"prompt": prompt, "completion": completion}


def test_winogrande_ends_the_sentence_as_lm_eval_does() -> None:
    from lm_eval.tasks.winogrande import preprocess_winogrande as task

    row = {"sentence": "Ann thanked Bea because _ had helped.", "option1": "Ann", "option2": "Bea", "answer": "2"}
    found = render(TEMPLATES["winogrande"], row)
    assert found["prompt"] == task.doc_to_choice(row)[task.doc_to_text(row)]
    assert found["completion"] == f" {task.doc_to_target(row)}"


def test_multiple_choice_by_number() -> None:
    row = {"question": "Which?", "choices": ["one", "two"], "answer": 1}
    assert render(TEMPLATES["multiple-choice"], row) == {"prompt": "Question: Which?\nAnswer:", "completion": " two"}


def test_a_template_that_is_none() -> None:
    assert mistake_in("{{question") and mistake_in("{% if %}")
    assert mistake_in("plain text") is None
