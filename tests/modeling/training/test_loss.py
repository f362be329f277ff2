"""The training loss: where the head runs, how accumulated batches weigh, what a checkpoint holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

from sqft.data.collators import Collator, PackingCollator, pack
from sqft.data.encoding import IGNORED, Tokenization
from sqft.errors import StageError
from sqft.modeling.training.loss import CompletionLoss, Distillation, Prediction, divergence, predict, sees_across
from sqft.planning.training_memory import logits_bytes
from sqft.recipe.sections import Finetune

SUMS = [{"prompt": f"{a}+{b}=", "completion": str(a + b)} for a in (1, 20, 300) for b in (4, 5000)]


def batch_of(
    records: list[dict[str, str]], tokenizer: PreTrainedTokenizerFast, loss_on: str = "completion"
) -> dict[str, Tensor]:
    examples = Tokenization(tokenizer, 32, loss_on).encode(records).examples
    return Collator(1)(examples)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


class Plain(nn.Module):
    """A model whose forward knows no `logits_to_keep`."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_every_gradient_equals_transformers_own(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_on: str
) -> None:
    batch = batch_of(SUMS, tokenizer, loss_on)
    theirs = model(**batch).loss
    theirs.backward()
    wanted = gradients(model)
    for wrapped in (CompletionLoss(model), CompletionLoss(Plain(model))):
        ours = wrapped(**batch)["loss"]
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
        ours.backward()
        torch.testing.assert_close(gradients(model), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_chunks_change_neither_loss_nor_gradients(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_on: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Against cross-entropy over all logits; in float64 too, where nothing but a mistake differs."""
    batch = batch_of(SUMS, tokenizer, loss_on)
    model.to(dtype)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    plain.backward()
    wanted = gradients(model)
    for chunk in (1, 3, 1000):
        ours = CompletionLoss(model, chunk)(**batch)["loss"]
        torch.testing.assert_close(ours, plain, rtol=tolerance, atol=tolerance)
        ours.backward()
        torch.testing.assert_close(gradients(model), wanted, rtol=tolerance, atol=tolerance)
        with torch.no_grad():
            torch.testing.assert_close(CompletionLoss(model, chunk)(**batch)["loss"], plain, rtol=tolerance, atol=0)


def test_no_more_logits_than_a_chunk(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = batch_of(SUMS, tokenizer)
    labels = int((batch["labels"] != IGNORED).sum())
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    CompletionLoss(model, 4)(**batch)["loss"].backward()
    assert max(seen) == 4 and sum(seen) == 2 * labels


@pytest.mark.parametrize("chunk", [None, 4])
def test_a_batch_without_labels_has_no_loss_and_gradients_of_zero(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chunk: int | None
) -> None:
    """What a process without rows of a batch takes part with: its gradients are there, and nothing."""
    batch = batch_of(SUMS[:1], tokenizer)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    of_no_label = {"probabilities": torch.zeros(0, 4), "tokens": torch.zeros(0, 3, dtype=torch.int32)}
    for taught in ({}, of_no_label):
        wrapped = CompletionLoss(model, chunk, Distillation(0.5, 1.0))
        loss = wrapped(**batch, **taught, num_items_in_batch=7)["loss"]
        loss.backward()
        found = gradients(model)
        assert loss == 0 and found.keys() == dict(model.named_parameters()).keys()
        assert not any(value.any() for value in found.values())


def test_logits_that_are_not_the_head_s_are_refused(model: LlamaForCausalLM) -> None:
    class Capped(LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = 30 * torch.tanh(output.logits / 30)
            return output

    ids = torch.arange(2, 20)[None]
    CompletionLoss(model, 4).check_head(ids)
    capped = Capped(model.config).eval()
    capped.lm_head.weight.data *= 100
    with pytest.raises(StageError, match="loss_chunk: the logits of Capped are not"):
        CompletionLoss(capped, 4).check_head(ids)
    with pytest.raises(StageError, match="loss_chunk"):
        CompletionLoss(Plain(model), 4).check_head(ids)


def test_the_head_runs_only_where_a_label_follows(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    batch = batch_of(SUMS, tokenizer)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[1]))
    CompletionLoss(model)(**batch)
    columns = (batch["labels"][:, 1:] != IGNORED).any(0)
    assert seen == [int(columns.sum())] and seen[0] < batch["input_ids"].shape[1]


def test_accumulated_batches_equal_one_large_batch(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Unequal parts: with each part's own mean, short completions would weigh more."""
    wrapped = CompletionLoss(model)
    whole = batch_of(SUMS, tokenizer)
    count = (whole["labels"][:, 1:] != IGNORED).sum()
    wrapped(**whole)["loss"].backward()
    wanted = gradients(model)
    for part in (SUMS[:1], SUMS[1:]):
        wrapped(**batch_of(part, tokenizer), num_items_in_batch=count)["loss"].backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_trainer_weighs_every_label_that_has_a_prediction(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, loss_on: str
) -> None:
    """Trainer's own count is the divisor: a label in a row's first place would make every step too small."""
    examples = Tokenization(tokenizer, 32, loss_on).encode(SUMS).examples
    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=3, logging_steps=1,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True, remove_unused_columns=False,
    )  # fmt: skip
    expected = CompletionLoss(model)(**Collator(1)(examples))["loss"].item()
    trainer = Trainer(CompletionLoss(model), arguments, train_dataset=examples, data_collator=Collator(1))
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_checkpoint_brings_back_what_trained(model: LlamaForCausalLM) -> None:
    model.requires_grad_(False)
    trained = model.model.layers[1].mlp.up_proj.weight.requires_grad_(True)
    wrapped = CompletionLoss(model)
    state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    assert list(state) == ["model.model.layers.1.mlp.up_proj.weight"]
    before = trained.detach().clone()
    with torch.no_grad():
        trained.zero_()
    wrapped.load_state_dict(state)
    assert torch.equal(trained, before)
    with pytest.raises(RuntimeError, match="does not fit"):
        wrapped.load_state_dict({})
    with pytest.raises(RuntimeError, match="does not fit"):
        wrapped.load_state_dict({**state, "stranger": trained})


@pytest.mark.parametrize("loss_on", ["completion", "all"])
def test_packed_rows_train_as_padded_ones(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, loss_on: str
) -> None:
    assert not sees_across(model)
    wrapped, batch = CompletionLoss(model), batch_of(SUMS, tokenizer, loss_on)
    padded = wrapped(**batch)["loss"]
    padded.backward()
    wanted = gradients(model)
    rows = pack(Tokenization(tokenizer, 32, loss_on).encode(SUMS).examples, 32)
    assert 1 < len(rows) < len(SUMS)
    packed = wrapped(**PackingCollator(1)(rows))["loss"]
    torch.testing.assert_close(packed, padded, rtol=1e-6, atol=1e-6)
    packed.backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-5, atol=1e-6)


# -- a teacher -----------------------------------------------------------------------------------


def full_kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) summed over rows, of the whole vocabulary, by its definition."""
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (teacher, student))
    return (p * (p.log() - q.log())).sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_kl_on_the_most_probable_tokens_is_a_lower_bound(temperature: float) -> None:
    """By the data-processing inequality it grows with what is told apart, up to that of the whole vocabulary."""
    generator = torch.Generator().manual_seed(3)
    teacher, student = (4 * torch.randn(2, 20, 30, generator=generator, dtype=torch.float64)).unbind()
    wanted = float(full_kl(teacher, student, temperature))
    found = [
        float(divergence(predict(teacher, temperature, k), student, temperature)) for k in (1, 2, 5, 17, 29, 30, None)
    ]
    assert found == sorted(found) and 0 < found[0] < found[3] < wanted
    assert found[4:] == pytest.approx([wanted] * 3, rel=1e-12)  # of 30, 29 and the rest are all
    same = [float(divergence(predict(teacher, temperature, k), teacher, temperature)) for k in (1, 5, 30)]
    assert same == pytest.approx([0.0] * 3, abs=1e-12)


def test_a_certain_teacher_and_a_larger_student() -> None:
    """Probabilities of 0 and 1 in float32 stay finite; rows that the teacher does not have are no token of its own."""
    teacher, student = torch.tensor([[200.0, 0.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]], requires_grad=True)
    for top_k in (1, 2, None):
        kl = divergence(predict(teacher, 1.0, top_k), student, 1.0)
        torch.testing.assert_close(kl, -student.log_softmax(-1)[0, 0])
        kl.backward()
        assert student.grad is not None and student.grad.isfinite().all()


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("top_k", [None, 7])
@pytest.mark.parametrize("weight", [0.3, 1.0])
def test_the_mixed_loss_and_its_gradients_are_the_naive_ones(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, chunk: int | None, top_k: int | None, weight: float
) -> None:
    """Against cross-entropy and KL written out, over all logits in float64, and autograd of that."""
    model.double()
    batch, temperature = batch_of(SUMS, tokenizer), 2.0
    labelled = batch["labels"][:, 1:] != IGNORED
    generator = torch.Generator().manual_seed(1)
    theirs = torch.randn(int(labelled.sum()), len(tokenizer), generator=generator, dtype=torch.float64)
    prediction = predict(theirs, temperature, top_k)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1][labelled]
    cross_entropy = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:][labelled])
    q = (logits / temperature).softmax(-1)
    if prediction.tokens is not None:
        top = q.gather(1, prediction.tokens)
        q = torch.cat([top, 1 - top.sum(1, keepdim=True)], 1)
    p = prediction.probabilities
    kl = (p * (p.log() - q.log())).sum() / len(logits)
    plain = (1 - weight) * cross_entropy + weight * temperature**2 * kl
    plain.backward()
    wanted = gradients(model)
    loss = CompletionLoss(model, chunk, Distillation(weight, temperature))
    given = {name: tensor for name, tensor in zip(Prediction._fields, prediction, strict=True) if tensor is not None}
    ours = loss(**batch, **given)["loss"]
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.as_tensor(loss.divergence), kl.detach(), rtol=1e-12, atol=0)
    ours.backward()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-9, atol=1e-12)
    # Without predictions, as in validation, it is the cross-entropy alone.
    torch.testing.assert_close(loss(**batch)["loss"], cross_entropy, rtol=1e-12, atol=0)


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors that live at once, by their storages."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for storage in (t.untyped_storage() for t in tree_iter((args, result)) if isinstance(t, Tensor)):
            self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.live = {place: one for place, one in self.live.items() if not one[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.parametrize("chunk", [None, 6])
@pytest.mark.parametrize("teacher", [None, {"model": "dense"}, {"model": "dense", "top_k": None}])
def test_the_plan_counts_what_the_loss_keeps(
    model: LlamaForCausalLM, chunk: int | None, teacher: dict[str, Any] | None
) -> None:
    """Of a vocabulary so large that little else matters: no more than the plan says, and not much less."""
    vocabulary, ids = 20_000, torch.arange(36).view(4, 9) + 2
    model = LlamaForCausalLM(model.config.__class__(**model.config.to_dict() | {"vocab_size": vocabulary}))
    model.requires_grad_(False).model.norm.weight.requires_grad_(True)
    section = Finetune.model_validate(
        {"adapter": "nls", "merger": "sparsepeft", "data": "a", "batch_size": 4, "max_length": 8, "loss_on": "all"}
        | {"teacher": teacher, "loss_chunk": chunk}
    )
    given: dict[str, Tensor | None] = {}
    if section.teacher:
        given = predict(torch.randn(32, vocabulary), 1.0, section.teacher.top_k)._asdict()
    with Peak() as peak:
        CompletionLoss(model, chunk, Distillation(0.5, 1.0))(ids, ids, **given)["loss"].backward()
    planned = logits_bytes(SimpleNamespace(size=lambda name: vocabulary), section)  # type: ignore[arg-type]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    assert 0.75 * planned < peak.bytes - weights < 1.02 * planned


def test_a_model_that_cannot_be_told_where_an_example_begins(model: LlamaForCausalLM) -> None:
    assert sees_across(Plain(model))
