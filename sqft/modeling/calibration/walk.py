"""The calibration walk: block after block, each seeing the outputs of the already compressed ones.

There are two ways to run a block, and both give its layers the same inputs (`dry_run.how_to_walk` chooses):

- "blocks": each block by itself (`block_runs.replayed`). Each window is computed about twice, and an accelerator holds
  one block at a time.
- "model": the model from its start up to the block (`block_runs.in_model`). It works for any model, costs about half as
  many passes as the model has blocks, and an accelerator must hold the model as a whole.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial

from torch import Tensor, nn
from transformers import PreTrainedModel

from sqft.modeling.architecture.blocks import decoder_blocks
from sqft.modeling.architecture.experts import Expert, route_all_tokens
from sqft.modeling.calibration.block_runs import RUNS
from sqft.modeling.calibration.capture import Residence
from sqft.modeling.calibration.observe import hooked, observe
from sqft.modeling.calibration.team import Team
from sqft.types import HESSIAN_BYTES, LinearStats, Statistic
from sqft.utils.progress import Track

log = logging.getLogger("sqft")


def walk(
    model: PreTrainedModel,
    windows: Tensor,
    chosen: set[str],
    needs: frozenset[Statistic],
    compress: Callable[[str, nn.Linear, LinearStats], None],
    device: str,
    track: Track,
    sequential: bool = False,
    way: str = "blocks",
    residence: Residence | None = None,
    done: Container[str] = (),
    team: Team | None = None,
) -> None:
    """Feed windows of text through the model, and call `compress` for each chosen linear layer.

    After `compress` has changed a block's weights, later blocks see what comes of them.

    Args:
        model: on the CPU, where it also ends.
        windows: token ids [samples, length].
        chosen: full names of linear layers.
        needs: the statistics that `compress` gets of each layer's inputs.
        compress: called with a layer's name, the layer, and its statistics; it may change the weight in place.
        device: where one block at a time is run, or the model as a whole.
        track: shows progress.
        sequential: later layers of the same block see new outputs too: the block is run again for each set of layers
            that share an input. The experts of a mixture count as one layer in this.
        way: "blocks" or "model", as `how_to_walk` says of the model.
        residence: where the model and the hidden states are. Only by the way of "blocks" may parts be elsewhere.
        done: blocks that are compressed already, in what `residence.around` has in memory.
        team: processes that all call this with the same arguments, and share the windows. Only the first one calls
            `compress`, with the statistics of all windows.

    Raises:
        ModelError: when the way is "blocks" and the blocks cannot be replayed.
        StageError: when an activation is not finite, no token reaches a layer, or processes see different blocks done.
    """
    blocks, team = decoder_blocks(model), team or Team()
    team.assert_same([name for name in blocks if name in done], "finished blocks")
    runs = RUNS[way](model, blocks, team.share_of(windows), device, residence or Residence())
    for name, run in track(runs, "calibrating", len(blocks)):
        if name in done:
            continue
        layers = {
            f"{name}.{inner}": module
            for inner, module in run.block.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.{inner}" in chosen
        }
        groups = [layers] if layers else []
        experts = {f"{name}.{inner}" for inner, module in run.block.named_modules() if isinstance(module, Expert)}
        if sequential and layers:
            together = [list(some) for some in _by_input(layers, experts, partial(run, 0))]
            sets = ({layer: layers[layer] for layer in some} for some in team.agreed(together))
            groups = list(_within(HESSIAN_BYTES, sets))
        for group in groups:
            steady = way == "blocks" and not _beside(group, experts, name)
            observed = team.sum(observe(run, group, needs, steady), group)
            if unreached := {layer: linear for layer, linear in group.items() if not observed[layer].tokens}:
                with route_all_tokens(run.block):
                    observed |= team.sum(observe(run, unreached, needs), unreached)
                log.warning("no token is routed to %s; measured on every token instead", ", ".join(unreached))
            for layer, linear in group.items():
                if team.is_main:
                    compress(layer, linear, replace(observed[layer].result(layer), unreached=layer in unreached))
                team.give(linear)


def _beside(layers: Iterable[str], experts: Iterable[str], block: str) -> bool:
    """Return whether some of these layers are in a part of the block that has experts: which of those run, and how
    often, depends on the text."""

    def part(name: str) -> str:
        return name.removeprefix(f"{block}.").partition(".")[0]

    return not {part(layer) for layer in layers}.isdisjoint(map(part, experts))


def _by_input(
    layers: Mapping[str, nn.Linear], experts: set[str], run: Callable[[], object]
) -> list[dict[str, nn.Linear]]:
    """Return the layers in the order they run, in sets of those that are given the same tensor.

    Layers of one kind of all experts are in one set too: experts run beside one another, and what becomes of one, no
    other sees. A layer that the run does not reach comes with those of its kind, or last: other windows may reach it.

    Args:
        layers: the layers by full name.
        experts: full names of the modules that are one expert each.
        run: runs the block once.
    """
    # 1. Run once: layers that are given the same tensor object are in one set.
    sets: list[dict[str, nn.Linear]] = []
    inputs: list[Tensor] = []  # kept alive, so that no other tensor takes the identity of one

    def hook(name: str) -> Callable[..., None]:
        def collect(linear: nn.Linear, args: tuple[Tensor, ...]) -> None:
            known = next((index for index, given in enumerate(inputs) if given is args[0]), None)
            if known is None:
                inputs.append(args[0])
                sets.append({})
            sets[-1 if known is None else known].setdefault(name, linear)

        return collect

    with hooked(layers, hook):
        run()

    # 2. Join sets that differ only in which expert their layers belong to.
    def kind(name: str) -> str:
        parent, _, last = name.rpartition(".")
        return f"{parent.rpartition('.')[0]}.*.{last}" if parent in experts else name

    together: dict[frozenset[str], dict[str, nn.Linear]] = {}
    for some in sets:
        together.setdefault(frozenset(map(kind, some)), {}).update(some)
    # 3. Add the layers that did not run.
    for name, layer in layers.items():
        if not any(name in some for some in sets):
            own = next((kinds for kinds in together if kind(name) in kinds), frozenset())
            together.setdefault(own, {})[name] = layer
    return list(together.values())


def _within(limit: int, sets: Iterable[dict[str, nn.Linear]]) -> Iterator[dict[str, nn.Linear]]:
    """Split sets into parts whose Hessians take no more than `limit` bytes: layers of one set do not depend on one
    another. A single layer may take more."""
    for some in sets:
        part: dict[str, nn.Linear] = {}
        for name, layer in some.items():
            if part and sum(4 * one.in_features**2 for one in (*part.values(), layer)) > limit:
                yield part
                part = {}
            part[name] = layer
        yield part
