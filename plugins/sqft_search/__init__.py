"""Searchers beyond the paper: by what ranks take away, by the training losses, by races, and by evolution."""

from __future__ import annotations

from collections.abc import Iterator

from sqft.api import Searcher, hookimpl
from sqft_search.evolutionary import Evolutionary
from sqft_search.importance import Importance
from sqft_search.loss_guided import LossGuided
from sqft_search.racing import Racing


@hookimpl
def sqft_searchers() -> Iterator[type[Searcher]]:
    yield from (Importance, LossGuided, Racing, Evolutionary)
