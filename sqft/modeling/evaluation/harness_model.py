"""A model as lm-eval sees it, with sqft's progress, and with answers that do not depend on the batch."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from sqft.modeling.evaluation.generation import padding_matters
from sqft.utils.progress import Track

log = logging.getLogger("sqft")


FEW = 8
"""The batch size that "auto" stands for where prompts of one length are few."""


class HarnessModel(HFLM):
    """lm-eval's wrapper of a model. It pads at the right to score a text, where no later token changes an earlier
    one, and at the left to generate: there only prompts of equal length share a batch if padding changes answers."""

    def __init__(self, track: Track, **arguments: Any) -> None:
        wrapper = logging.getLogger("lm_eval.models.huggingface")
        level = wrapper.level
        wrapper.setLevel(logging.ERROR)  # it warns that the model is an object
        try:
            super().__init__(**arguments)
        finally:
            wrapper.setLevel(level)
        self._track = track

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        with self._shown(requests, "log-likelihoods"):
            scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
            return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        with self._shown(requests, "log-likelihoods"):
            scores: list[float] = super().loglikelihood_rolling(requests, disable_tqdm=True)
            return scores

    def _loglikelihood_tokens(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        scores: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, **options | {"disable_tqdm": True})
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        together = defaultdict(list)
        equal = padding_matters(self.model, self.tokenizer.pad_token_id, prompts)
        if equal and self.batch_size == "auto":  # lm-eval would look for it anew for each length
            self.batch_size_per_gpu = FEW
        for index, prompt in enumerate(prompts):
            together[len(prompt) if equal else 0].append(index)
        texts: dict[int, str] = {}
        with self._shown(requests, "generating"):
            for indices in together.values():
                said = super().generate_until([requests[index] for index in indices], disable_tqdm=True)
                texts.update(zip(indices, said, strict=True))
        return [texts[index] for index in range(len(requests))]

    @contextmanager
    def _shown(self, requests: Sequence[Any], label: str) -> Iterator[None]:
        """Show progress: lm-eval tells its cache of each answer."""
        steps = iter(self._track(range(len(requests)), label, len(requests)))
        self.set_cache_hook(_Answered(steps))
        try:
            yield
        finally:
            self.set_cache_hook(CacheHook(None))
            for _ in steps:  # ends the display
                pass


class _Answered(CacheHook):
    """Takes a step for each answer."""

    def __init__(self, steps: Iterator[Any]) -> None:
        super().__init__(None)
        self._steps = steps

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        next(self._steps, None)
