"""Check what this machine and this installation can do, and what is missing. A failed check never stops the next."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module, metadata, util
from pathlib import Path
from typing import Any, Literal

import sqft
from sqft.utils.files import existing_parent, unwritable

State = Literal["ok", "absent", "wrong"]
OPTIONAL_PACKAGES = {
    "gptqmodel": "the quantizer of plugins/sqft-gptqmodel; GPTQ checkpoints in transformers",
    "optimum": "GPTQ checkpoints in transformers",
    "bitsandbytes": "optimizers of finetune with 8-bit or paged state",
    "compressed-tensors": "what the exporter compressed-tensors writes, in transformers",
}
"""Packages that sqft runs without, and what needs each. Those of sqft's own extras are read from its metadata."""
EXTRA_FEATURES = {"gguf": "GGUF files as models", "matplotlib": "charts (sqft report)"}
"""The feature that needs a package of an extra, where the extra's name does not say it."""
DEVELOPER_EXTRAS = {"dev", "docs"}
"""Extras of sqft that users do not need."""
EXTRA = re.compile(r'(?<=extra == ")[^"]+')


@dataclass(frozen=True)
class Check:
    """The result of one check. If it is needed and not ok, the user must act."""

    group: Literal["packages", "devices", "plugins", "store"]
    name: str
    found: str
    state: State = "ok"
    needed: bool = False
    note: str = ""
    """The feature that needs it, and how to fix it."""

    @property
    def fails(self) -> bool:
        """Whether sqft cannot work because of it."""
        return self.needed and self.state != "ok"


def checks(store: Path) -> Iterator[Check]:
    """Check everything, one group after the other; a group that raises counts as one failed check."""
    groups: dict[Any, Callable[[], Iterator[Check]]] = {
        "packages": _packages,
        "devices": _devices,
        "plugins": _plugins,
        "store": lambda: _disk(store),
    }
    for group, run_checks in groups.items():
        try:
            yield from run_checks()
        except Exception as error:
            yield Check(group, group, "cannot be checked", "wrong", True, _in_a_line(error))


def _packages() -> Iterator[Check]:
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        about, lines = metadata.metadata("sqft"), metadata.requires("sqft") or []
        python, installed = SpecifierSet(about["Requires-Python"] or ""), about["Version"]
    except metadata.PackageNotFoundError:
        note = "it is not installed as a package, so its plugins are not found; run pip install -e . in its folder"
        yield Check("packages", "sqft", sqft.__version__, "wrong", True, note)
        return
    version = platform.python_version()
    fits = python.contains(version, prereleases=True)
    yield Check("packages", "python", version, "ok" if fits else "wrong", True, "" if fits else f"sqft needs {python}")
    same = installed == sqft.__version__
    note = "" if same else f"the installed metadata says {installed}; install it again"
    yield Check("packages", "sqft", sqft.__version__, "ok" if same else "wrong", True, note)
    listed = set()
    for requirement in map(Requirement, lines):
        extra = (EXTRA.search(str(requirement.marker or "")) or [""])[0]
        if not extra and (requirement.marker is None or requirement.marker.evaluate()):
            listed.add(requirement.name)
            yield _package(requirement)
        elif extra and extra not in DEVELOPER_EXTRAS:
            listed.add(requirement.name)
            yield _package(requirement, EXTRA_FEATURES.get(requirement.name, f"the extra '{extra}'"), f"sqft[{extra}]")
    for name, feature in OPTIONAL_PACKAGES.items():
        if name not in listed:
            yield _package(Requirement(name), feature)


def _package(requirement: Any, feature: str = "", install: str = "") -> Check:
    """Check that a package is installed, has a supported version and, if sqft needs it, can be imported."""
    needed = not feature
    without = f"needed for {feature}; " if feature else ""
    remedy = f"pip install '{install or requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Check("packages", requirement.name, "missing", "absent", needed, without + remedy)
    if not requirement.specifier.contains(version, prereleases=True):
        note = f"{without}sqft needs {requirement.specifier}: {remedy}"
        return Check("packages", requirement.name, version, "wrong", needed, note)
    module = requirement.name.replace("-", "_").lower()
    try:
        if needed:
            with warnings.catch_warnings(), redirect_stdout(sys.stderr):
                warnings.simplefilter("ignore")
                import_module(module)
        elif util.find_spec(module) is None:
            raise ImportError(f"no module named {module}")
    except (Exception, SystemExit) as error:
        note = f"{without}it cannot be imported ({_in_a_line(error)}); {remedy} --force-reinstall"
        return Check("packages", requirement.name, version, "wrong", needed, note)
    return Check("packages", requirement.name, version, "ok", needed)


def _devices() -> Iterator[Check]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        import torch
    except Exception as error:
        yield Check(
            "devices", "cpu", f"{cores} cores", "wrong", True, f"torch cannot be imported ({_in_a_line(error)})"
        )
        return
    yield Check("devices", "cpu", f"{cores} cores, torch uses {torch.get_num_threads()} threads")
    try:
        fits, why = _int4_kernel(), "its result is wrong"
    except Exception as error:
        fits, why = False, _in_a_line(error)
    if fits:
        yield Check("devices", "int4 kernel", "usable")
    else:
        note = f"INT4 models decode slowly, since their weights are unpacked at every step ({why})"
        yield Check("devices", "int4 kernel", "not usable", "absent", False, note)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not gpus:
        why = "this torch is built without CUDA" if torch.version.cuda is None else "torch finds no NVIDIA GPU"
        yield Check("devices", "cuda", "none", "absent", False, f"{why}; everything runs on the CPU")
    for index in range(gpus):
        gpu = torch.cuda.get_device_properties(index)
        try:
            free = f", {_gib(torch.cuda.mem_get_info(index)[0])} free"
        except RuntimeError as error:
            free = f", which cannot be used ({_in_a_line(error)})"
        yield Check("devices", f"cuda:{index}", f"{gpu.name}, {_gib(gpu.total_memory)}{free}")


def _int4_kernel() -> bool:
    """Return whether torch's int4 kernel gives the same product as the dequantized weights."""
    import torch

    from sqft.kernels.grids import dequantize
    from sqft.modeling.adapters.frozen_weight import PackedWeight
    from sqft.types import Grid, Quantized

    codes = torch.arange(16 * 32, dtype=torch.int32).reshape(16, 32).remainder(16).to(torch.uint8)
    layer = Quantized(codes, Grid(torch.ones(16, 1).half(), torch.full((16, 1), 8), 32, 4))
    weight, x = PackedWeight(layer, None, torch.bfloat16), torch.eye(32, dtype=torch.bfloat16)[:1]
    with torch.no_grad():
        return weight.prepare_int4_kernel() and torch.equal(weight.linear(x, None).float(), dequantize(layer)[:, :1].T)


def _plugins() -> Iterator[Check]:
    from sqft.components.registry import Registry

    registry = Registry.discover()
    entries = registry.entries()
    plugins = {registration.provider for registration in entries}
    state: State = "ok" if entries else "wrong"
    note = "" if entries else "not even those of sqft are found; install it again"
    yield Check("plugins", "installed", f"{len(entries)} components of {len(plugins)} plugins", state, True, note)
    for broken in registry.broken():
        ours = broken.source.startswith("sqft ")
        note = f"{broken.reason}; fix or uninstall it, or skip it with --disable {broken.plugin}"
        yield Check("plugins", broken.plugin, broken.source, "wrong", ours, note)


def _disk(store: Path) -> Iterator[Check]:
    free = f"{store}: {_gib(shutil.disk_usage(existing_parent(store)).free)} free"
    why = unwritable(store)
    note = f"{why}; name another with --store" if why else ""
    yield Check("store", "disk", free, "wrong" if why else "ok", True, note)


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _in_a_line(error: BaseException) -> str:
    """Return an error's class and the first line of its message."""
    first = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
