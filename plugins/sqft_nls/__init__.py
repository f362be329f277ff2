"""Neural low-rank adapter search (paper §2.2): elastic adapters, and searchers over their ranks."""

from __future__ import annotations

from collections.abc import Iterator

from sqft.api import Adapter, Searcher, hookimpl
from sqft_nls.adapter import Lora, Nls
from sqft_nls.searchers import Heuristic, HillClimbing, Maximal, Minimal, RandomSearch


@hookimpl
def sqft_adapters() -> Iterator[type[Adapter]]:
    yield from (Nls, Lora)


@hookimpl
def sqft_searchers() -> Iterator[type[Searcher]]:
    yield from (Heuristic, Maximal, Minimal, RandomSearch, HillClimbing)
