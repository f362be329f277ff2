"""Sum the statistics of what some layers of a block are given, in no more work than that takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from weakref import ReferenceType, ref

from torch import Tensor, nn

from sqft.errors import StageError
from sqft.kernels.finite import all_finite
from sqft.modeling.calibration.block_runs import NOT_FINITE, BlockRun
from sqft.modeling.calibration.statistics import InputStatistics
from sqft.types import Statistic

Hook = Callable[[nn.Module, tuple[Tensor, ...]], None]


def observe(
    run: BlockRun, layers: Mapping[str, nn.Linear], needs: frozenset[Statistic], steady: bool = False
) -> dict[str, InputStatistics]:
    """Run a block on all windows; return the statistics of what these layers are given, by name.

    Layers that are always given the same tensor (queries, keys and values) share one sum.

    Args:
        run: runs the block on a window.
        layers: layers of the block, by name.
        needs: the statistics to sum.
        steady: whether every window calls these layers equally often, so that a run may end with the last of them.

    Raises:
        StageError: when what a layer is given is not finite, or what the block gives where it runs to its end.
    """
    with suppress(_NotShared):
        return _Observer(needs, shared=True).observe(run, layers, steady)
    return _Observer(needs, shared=False).observe(run, layers, steady)


@contextmanager
def hooked(layers: Mapping[str, nn.Linear], hook: Callable[[str], Hook]) -> Iterator[None]:
    """Call `hook(name)` before each of these layers runs, with the layer and its arguments."""
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _NotShared(Exception):
    """Layers that began with the same tensors were given different ones."""


class _Enough(Exception):
    """The last of the layers has been called."""


class _Observer:
    """Sums, as layers are called. A layer whose first tensor another one was given before it, as its own first, follows
    that one: it must be given the same tensor each time, and has no sum of its own."""

    def __init__(self, needs: frozenset[Statistic], shared: bool) -> None:
        self.needs, self.shared = needs, shared
        self.sums: dict[str, InputStatistics] = {}
        self.leaders: dict[str, str] = {}
        self.calls = Counter[str]()
        self.given: dict[str, tuple[ReferenceType[Tensor], int]] = {}
        """What each layer with a sum was last given in this window, and how often that had been changed in place. It is
        not kept alive: a tensor that is gone no other layer can be given."""
        self.last_call: int | None = None
        """The number of calls in a window, when a run may end with the last one."""
        self.left: int | None = None
        """How many of those are still to come in this window."""

    def observe(self, run: BlockRun, layers: Mapping[str, nn.Linear], steady: bool) -> dict[str, InputStatistics]:
        """Run the block on all windows; see the function."""
        with hooked(layers, self._hook):
            for index in range(run.windows):
                self.given.clear()
                self.left = self.last_call
                with suppress(_Enough):
                    run(index)
                if steady and self.last_call is None:
                    self.last_call = self.calls.total()
        if any(self.calls[name] != self.calls[leader] for name, leader in self.leaders.items()):
            raise _NotShared
        return {name: self.sums.get(self.leaders.get(name, name)) or InputStatistics(self.needs) for name in layers}

    def _hook(self, name: str) -> Hook:
        def called(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.calls[name] += 1
            if self._leader(name, args[0]) is None:
                self.given[name] = ref(args[0]), args[0]._version
                self.sums.setdefault(name, InputStatistics(self.needs)).add(args[0])
            if self.left is not None:
                if not all_finite(args[0]):
                    raise StageError(NOT_FINITE)
                self.left -= 1
                if self.left == 0:
                    raise _Enough

        return called

    def _leader(self, name: str, given: Tensor) -> str | None:
        """Return the layer that this one follows; None when it has a sum of its own.

        Raises:
            _NotShared: when it was given something else than the one that it follows.
        """
        if self.calls[name] == 1 and self.shared:
            for other in self.given:
                if self.calls[other] == 1 and self._same(other, given):
                    self.leaders[name] = other
        leader = self.leaders.get(name)
        if leader and not (self._same(leader, given) and self.calls[leader] == self.calls[name]):
            raise _NotShared
        return leader

    def _same(self, other: str, given: Tensor) -> bool:
        tensor, version = self.given.get(other, (lambda: None, 0))
        return tensor() is given and version == given._version
