"""Generate greedily from batches of prompts, so that what comes of a prompt does not depend on its batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from sqft.errors import StageError

PROBED = 16
"""Tokens by which the longer prompt exceeds the shorter one when padding is tested."""


@torch.inference_mode()
def generate(
    model: PreTrainedModel, pad_token: int, prompts: Sequence[Sequence[int]], settings: GenerationConfig
) -> list[list[int]]:
    """Generate from a batch of prompts, padded at the left; return the tokens of each up to its end of sequence."""
    ids, mask = _padded(prompts, pad_token)
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
    )
    generated: list[list[int]] = output[:, ids.shape[1] :].tolist()
    ends = [
        next((at for at, token in enumerate(tokens) if token in settings.eos_token_id), None) for tokens in generated
    ]
    return [tokens[:end] for tokens, end in zip(generated, ends, strict=True)]


@torch.inference_mode()
def padding_matters(model: PreTrainedModel, pad_token: int, prompts: Sequence[Sequence[int]]) -> bool:
    """Return whether padding at the left changes what the model says, as where a model ignores its attention mask.

    The shortest prompt is run alone, and padded to a longer one's length with two different tokens. Behind a mask that
    counts, the two runs are the same computation, equal to the last digit; alone, rounding may differ: it is allowed
    half of the digits.

    Args:
        model: in evaluation mode, on its device.
        pad_token: one of the two tokens.
        prompts: token ids of each; where all have the same length, nothing is padded.
    """
    by_length = sorted(filter(None, prompts), key=len)
    if not by_length or len(by_length[0]) == len(by_length[-1]):
        return False
    short = by_length[0]
    long = by_length[-1][-(len(short) + PROBED) :]
    other = next((token for token in long if token != pad_token), 0)
    alone = _first_logits(model, [short], pad_token)
    padded, padded_otherwise = (_first_logits(model, [short, long], token) for token in (pad_token, other))
    largest, rounding = alone.abs().amax(), torch.finfo(model.dtype).eps
    return bool(
        (padded - padded_otherwise).abs().amax() > rounding * largest
        or (padded - alone).abs().amax() > rounding**0.5 * largest
    )


def _first_logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]], filling: int) -> Tensor:
    """Return the logits [vocabulary] from which the first prompt's first token is chosen."""
    ids, mask = _padded(prompts, filling)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=1,
        pad_token_id=filling,
        return_dict_in_generate=True,
        output_logits=True,
    )
    output = model.generate(
        input_ids=ids.to(model.device), attention_mask=mask.to(model.device), generation_config=settings
    )
    logits: Tensor = output.logits[0][0].float()
    return logits


def _padded(prompts: Sequence[Sequence[int]], filling: int) -> tuple[Tensor, Tensor]:
    """Return token ids and mask [batch, longest], filled at the left."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), filling)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch to evaluation mode, and afterwards each module back to its own."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def finite(model: PreTrainedModel) -> Iterator[None]:
    """Refuse logits that are not finite: they would pass for wrong answers.

    Raises:
        StageError: from the model's forward.
    """

    def check(_: nn.Module, __: Any, given: dict[str, Any], output: Any) -> None:
        # With a mask there is padding at the left, whose logits may be anything; the last position is always a token.
        logits = output.logits if given.get("attention_mask") is None else output.logits[:, -1]
        if not logits.amax().isfinite():
            raise StageError("the model's logits are not finite; its precision may be too low")

    hook = model.register_forward_hook(check, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def greedy(model: PreTrainedModel, tokenizer: Any, also: Iterable[int] = ()) -> Iterator[GenerationConfig]:
    """Make generation plain and greedy; of the settings in the model's folder only the ends of sequence stay.

    The tokens in `also` end it too, such as the one that ends a turn of a chat.

    `generate` takes every setting that is not given to it from `model.generation_config`, penalties and forced tokens
    included, and so that one is replaced meanwhile.
    """
    own = model.generation_config
    ends = own.eos_token_id if own is not None else None
    all_ends = [*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id, *also]
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({end for end in all_ends if end is not None}),
    )
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = own
