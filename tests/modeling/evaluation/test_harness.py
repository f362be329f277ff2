"""lm-eval: its metrics, what they hang on, and what it leaves behind."""

from __future__ import annotations

import copy
import logging
import math
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    GenerationConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from sqft.data.conversations import conversation_in
from sqft.data.encoding import encode_prompt
from sqft.errors import StageError
from sqft.modeling.evaluation import exact_match
from sqft.modeling.evaluation.harness import TaskSettings, lm_eval_tasks, load_tasks, ready_tasks
from sqft.utils.progress import silent

WriteTasks = Callable[[list[dict[str, Any]]], Path]
DOCUMENTS = [{"q": f"{n}+1=", "a": "2", "i": n % 2} for n in range(4)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("tasks", [[], ["toy_choose"], ["toy_say"]], ids=str)
def test_answers_of_logits_that_are_not_finite_are_refused(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, write_tasks: WriteTasks, tasks: list[str], bad: float
) -> None:
    """Even for one record of a batch; they would count as wrong answers."""
    folder = write_tasks(DOCUMENTS)
    records = [{"prompt": document["q"], "completion": document["a"]} for document in DOCUMENTS]

    def spoil(_: Any, __: Any, output: Any) -> None:
        output.logits[-1, -1, 7] = bad

    model.register_forward_hook(spoil)
    with pytest.raises(StageError, match="logits are not finite"):
        if tasks:
            lm_eval_tasks(model, tokenizer, tasks, folder, TaskSettings(batch_size=2), silent)
        else:
            exact_match(model, tokenizer, records, "text", 4, 3, silent)
    assert len(model._forward_hooks) == 1


def test_metrics_and_no_trace(
    talker: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    by_hand: Any,
    write_tasks: WriteTasks,
    capfd: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither of the process's state nor on the screen: no bars, no prints, and no git, which complains elsewhere than
    in a repository."""
    monkeypatch.chdir(tmp_path)
    documents = [d | {"a": tokenizer.decode(by_hand(talker, d["q"], steps=4))} for d in DOCUMENTS]
    folder = write_tasks(documents)
    talker.train()
    config = talker.generation_config = GenerationConfig(eos_token_id=1, repetition_penalty=5.0, do_sample=True)
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    surroundings = os.environ.get("DISABLE_MULTIPROC"), logging.getLogger("lm_eval.models.huggingface").level
    found = lm_eval_tasks(talker, tokenizer, ["toy_choose", "toy_say"], folder, TaskSettings(batch_size=2), silent)
    assert list(found["metrics"]["toy_choose"]) == ["acc", "acc_stderr", "acc_norm", "acc_norm_stderr"]
    assert found["metrics"]["toy_say"] == {"exact_match,strict": 1.0, "exact_match,strict_stderr": 0.0}
    facts = {"version": 2.5, "num_fewshot": 0, "documents": 4, "of": 4}
    assert found["tasks"] == {"toy_choose": facts, "toy_say": facts} and found["samples"] == {}
    assert state == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    assert surroundings == (os.environ.get("DISABLE_MULTIPROC"), logging.getLogger("lm_eval.models.huggingface").level)
    assert talker.generation_config is config and talker.training
    assert capfd.readouterr() == ("", "")


def asked(found: dict[str, Any], task: str) -> list[str]:
    return [sample["arguments"][0][0] for sample in found["samples"][task]]


def test_how_a_question_is_asked(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, write_tasks: WriteTasks
) -> None:
    """The options reach lm-eval: shots, template, turns, system turn, generation; samples show it."""
    folder = write_tasks(DOCUMENTS)

    def ask(**settings: Any) -> dict[str, Any]:
        given = TaskSettings(log_samples=True, limit=2, **settings)
        return lm_eval_tasks(model, tokenizer, ["toy_say"], folder, given, silent)

    plain = ask(num_fewshot=1)
    assert plain["tasks"]["toy_say"] == {"version": 2.5, "num_fewshot": 1, "documents": 2, "of": 4}
    assert all(text.endswith("\n\n" + d["q"]) for text, d in zip(asked(plain, "toy_say"), DOCUMENTS, strict=False))
    chat = ask(num_fewshot=1, apply_chat_template=True, system_instruction="Add.")
    first = asked(chat, "toy_say")[0]
    assert first.startswith("<|im_start|>system\nAdd.<|im_end|>\n<|im_start|>user\n")
    assert first.count("<|im_start|>user\n") == 2 and first.count("2<|im_end|>") == 1
    assert first.endswith("<|im_start|>user\n0+1=<|im_end|>\n<|im_start|>assistant\n")
    together = ask(num_fewshot=1, apply_chat_template=True, fewshot_as_multiturn=False)
    assert asked(together, "toy_say")[0].count("<|im_start|>user\n") == 1
    assert chat["settings"]["apply_chat_template"] is True and chat["settings"]["system_instruction"] == "Add."
    short = ask(gen_kwargs={"max_gen_toks": 2})
    assert short["samples"]["toy_say"][0]["arguments"][0][1]["max_gen_toks"] == 2
    assert len(tokenizer(short["samples"]["toy_say"][0]["resps"][0][0])["input_ids"]) <= 2


def test_arguments_of_the_template(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, write_tasks: WriteTasks
) -> None:
    folder, own = write_tasks(DOCUMENTS), tokenizer.chat_template
    tokenizer.chat_template = "{{ 'thinks: ' if thinks else '' }}{{ messages[-1]['content'] }}"
    try:
        for arguments, start in (({"thinks": True}, "thinks: 0+1="), ({}, "0+1=")):
            given = TaskSettings(apply_chat_template=True, chat_template_kwargs=arguments, log_samples=True)
            assert asked(lm_eval_tasks(model, tokenizer, ["toy_say"], folder, given, silent), "toy_say")[0] == start
        with pytest.raises(StageError, match=r"apply_chat_template: .* no chat template 'tool'; it has default"):
            lm_eval_tasks(model, tokenizer, ["toy_say"], folder, TaskSettings(apply_chat_template="tool"), silent)
        tokenizer.chat_template = {"default": own, "tool": "tool: {{ messages[-1]['content'] }}"}
        given = TaskSettings(apply_chat_template="tool", log_samples=True)
        found = lm_eval_tasks(model, tokenizer, ["toy_say"], folder, given, silent)
        assert asked(found, "toy_say")[0] == "tool: 0+1="
        with pytest.raises(StageError, match=r"no chat template 'rag'; it has default, tool"):
            lm_eval_tasks(model, tokenizer, ["toy_say"], folder, TaskSettings(apply_chat_template="rag"), silent)
        tokenizer.chat_template = None
        with pytest.raises(StageError, match=r"apply_chat_template: .* no chat template; set it to false"):
            lm_eval_tasks(model, tokenizer, ["toy_say"], folder, TaskSettings(apply_chat_template=True), silent)
    finally:
        tokenizer.chat_template = own


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gen_kwargs": {"temprature": 2}}, "gen_kwargs.temprature: .* did you mean temperature"),
        ({"gen_kwargs": {"zzz": 2}}, "gen_kwargs.zzz: there is no such setting .* GenerationConfig"),
        ({"gen_kwargs": {"num_return_sequences": 2, "num_beams": 2}}, "num_return_sequences: lm-eval takes one answer"),
        ({"gen_kwargs": {"max_tokens": 0}}, "gen_kwargs.max_tokens: 0 is no number of tokens"),
        (
            {"gen_kwargs": {"max_tokens": 2, "max_new_tokens": 2}},
            "max_new_tokens and max_tokens are names of one thing",
        ),
        ({"gen_kwargs": {"max_tokens": 100000}}, "'toy_say' generates up to 100000 tokens, and the model's window of"),
        ({"num_fewshot": 4}, "evaluate.num_fewshot: 'toy_say' has no 4 examples; set it to 3 or less"),
    ],
    ids=str,
)
def test_settings_that_cannot_work(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    write_tasks: WriteTasks,
    settings: dict[str, Any],
    message: str,
) -> None:
    """They are found with the model's configuration alone, and name the field."""
    folder = write_tasks(DOCUMENTS)
    task = folder / "say.yaml"
    task.write_text(task.read_text() + "fewshot_split: test\n")
    with pytest.raises(StageError, match=rf"evaluate\..*{message.removeprefix('evaluate.')}"):
        ready_tasks(["toy_say"], folder, TaskSettings(**settings), tokenizer, model.config)


@pytest.mark.parametrize("name", ["max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"])
def test_the_length_of_an_answer_has_several_names(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, write_tasks: WriteTasks, name: str
) -> None:
    """Each replaces the task's own, and what else the task says stays."""
    settings = TaskSettings(gen_kwargs={name: 2})
    _, loaded = ready_tasks(["toy_say"], write_tasks(DOCUMENTS), settings, tokenizer, model.config)
    assert loaded["tasks"]["toy_say"].get_config("generation_kwargs") == {"until": ["<|im_end|>"], "max_gen_toks": 2}


@pytest.fixture
def beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a token before each text."""
    inner = copy.deepcopy(tokenizer.backend_tokenizer)
    inner.post_processor = TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


@pytest.mark.parametrize(("given", "begins"), [(None, True), (True, True), (False, False)])
def test_the_token_that_begins_a_text(
    model: LlamaForCausalLM,
    beginning: PreTrainedTokenizerFast,
    write_tasks: WriteTasks,
    given: bool | None,
    begins: bool,
) -> None:
    """As the tokenizer does it, or as the recipe says: in texts that are scored, and in prompts."""
    folder = write_tasks(DOCUMENTS)
    for task in ("toy_choose", "toy_say"):
        forward = model.forward
        seen: list[int] = []

        def watched(input_ids: Any = None, forward: Any = forward, seen: Any = seen, **rest: Any) -> Any:
            seen.append(input_ids[0, 0].item())
            return forward(input_ids=input_ids, **rest)

        model.forward = watched
        settings = TaskSettings(add_bos_token=given, gen_kwargs={"max_gen_toks": 1}, batch_size=1)
        found = lm_eval_tasks(model, beginning, [task], folder, settings, silent)
        model.forward = forward
        assert found["settings"]["add_bos_token"] is begins
        assert all((token == 0) == begins for token in seen) and len(seen) >= 4


@pytest.mark.parametrize("given", [None, True])
def test_a_prompt_of_the_template_is_the_one_of_training(
    model: LlamaForCausalLM, beginning: PreTrainedTokenizerFast, write_tasks: WriteTasks, given: bool | None
) -> None:
    """Where the template writes no token at the beginning, the tokenizer adds none, unless the recipe says so."""
    beginning.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    seen, forward = [], model.forward

    def watched(input_ids: Any = None, **rest: Any) -> Any:
        seen.append(input_ids[0].tolist())
        return forward(input_ids=input_ids, **rest)

    model.forward = watched
    settings = TaskSettings(apply_chat_template=True, add_bos_token=given, limit=1, gen_kwargs={"max_gen_toks": 1})
    found = lm_eval_tasks(model, beginning, ["toy_say"], write_tasks(DOCUMENTS), settings, silent)
    messages = [{"role": "user", "content": DOCUMENTS[0]["q"]}, {"role": "assistant", "content": "2"}]
    prompt = encode_prompt(conversation_in({"messages": messages}), beginning).ids
    assert found["settings"]["add_bos_token"] is bool(given)
    assert seen[-1] == ([0, *prompt] if given else prompt)


def test_a_token_that_the_tokenizer_does_not_put_there(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, write_tasks: WriteTasks
) -> None:
    folder = write_tasks(DOCUMENTS)
    found = lm_eval_tasks(model, tokenizer, ["toy_say"], folder, TaskSettings(), silent)
    assert found["settings"]["add_bos_token"] is False
    with pytest.raises(StageError, match=r"evaluate.add_bos_token: the model's tokenizer puts no token before a text"):
        lm_eval_tasks(model, tokenizer, ["toy_say"], folder, TaskSettings(add_bos_token=True), silent)


def test_auto_is_a_fixed_batch_size_on_a_cpu(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    write_tasks: WriteTasks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "sqft")
    folder = write_tasks(DOCUMENTS)
    found = lm_eval_tasks(model, tokenizer, ["toy_choose"], folder, TaskSettings(batch_size="auto"), silent)
    assert found["settings"]["batch_size"] == 8 and 'evaluate.batch_size: "auto" is 8 on a CPU' in caplog.messages


def test_what_lm_eval_warns_of_is_logged_once_a_kind(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    write_tasks: WriteTasks,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_tasks([{"q": f"{n} " + "long " * 80, "a": "2", "i": 0} for n in range(3)])
    lm_eval_tasks(model, tokenizer, ["toy_choose", "toy_say"], folder, TaskSettings(batch_size=1), silent)
    scored, said = [record.getMessage() for record in caplog.records if record.name == "sqft"]
    assert scored.startswith("lm-eval: Combined length of context (") and scored.endswith("more of this kind)")
    assert said.startswith("lm-eval: Left truncation applied.") and said.endswith("(2 more of this kind)")


def test_tasks_that_cannot_be_loaded(write_tasks: WriteTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its data set and a remedy: a file that is not there, a data set that cannot be downloaded, a module."""
    folder = write_tasks(DOCUMENTS)
    (folder / "far.yaml").write_text("include: say.yaml\ntask: far\ndataset_path: nobody/nothing\n")
    (folder / "code.yaml").write_text("include: say.yaml\ntask: code\nprocess_docs: !function needs.nothing\n")
    (folder / "needs.py").write_text("import a_module_that_nobody_has\n")
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    cases = {
        "far": r"evaluate.tasks: 'far' \(data set nobody/nothing\) cannot be loaded: .*; check the network",
        "code": r"evaluate.tasks: 'code' \(data set json\) cannot be loaded: .*a_module_that_nobody_has.*install that",
    }
    for name, message in cases.items():
        with pytest.raises(StageError, match=message):
            load_tasks(["toy_say", name], folder)
    (folder / "d.jsonl").unlink()
    with pytest.raises(StageError, match=r"'toy_say' \(data set json\) cannot be loaded: .*d.jsonl.*include_path"):
        load_tasks(["toy_say"], folder)
