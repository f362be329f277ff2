"""`sqft doctor` on this installation, and on others that are broken in one way each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from sqft import Registry
from sqft.cli import main
from sqft.components.registration import Provider
from sqft.tools import doctor
from sqft.tools.doctor import Check, checks


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing is tried once, by the command."""
    monkeypatch.setattr(doctor, "import_module", lambda name: None)


@pytest.fixture
def look(tmp_path: Path) -> Callable[[], dict[str, Check]]:
    return lambda: {check.name: check for check in checks(tmp_path / "store")}


def test_this_installation(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "sqft", "doctor", "--json", "--store", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["ok"] and {check["group"] for check in content["checks"]} == {
        "packages", "devices", "plugins", "store",
    }  # fmt: skip
    found = {check["name"]: check for check in content["checks"]}
    assert found["torch"]["found"] == metadata.version("torch") and found["torch"]["needed"]
    assert not found["gguf"]["needed"] and not found["gptqmodel"]["needed"]
    assert "cores" in found["cpu"]["found"] and "GiB free" in found["disk"]["found"]
    assert not {"pytest", "ruff", "mypy"} & found.keys()


def test_shown_in_groups(tmp_path: Path) -> None:
    shown = CliRunner().invoke(main, ["doctor", "--store", str(tmp_path)])
    assert shown.exit_code == 0, shown.output
    assert "packages:\n  ok  python" in shown.stdout and "\nstore:\n  ok  disk" in shown.stdout


@pytest.mark.parametrize(
    ("name", "found", "state", "note"),
    [
        ("torch", "1.0", "wrong", "pip install 'torch<3,>=2.8'"),
        ("rich", None, "absent", "pip install 'rich<16,>=13'"),
        ("gguf", None, "absent", "needed for GGUF files as models; pip install 'sqft[gguf]'"),
        ("gptqmodel", None, "absent", "the quantizer of plugins/sqft-gptqmodel"),
    ],
)
def test_versions(
    look: Callable[[], dict[str, Check]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    name: str, found: str | None, state: str, note: str,
) -> None:  # fmt: skip
    known = metadata.version

    def version(package: str) -> str:
        if package != name:
            return known(package)
        if found is None:
            raise metadata.PackageNotFoundError(package)
        return found

    monkeypatch.setattr(doctor.metadata, "version", version)
    check = look()[name]
    assert check.state == state and note in check.note and check.found == (found or "missing")
    done = CliRunner().invoke(main, ["doctor", "--store", str(tmp_path)])
    assert done.exit_code == (2 if check.needed else 0) and (name in done.stderr) == check.needed


def test_what_cannot_be_imported(look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        if name == "peft":
            raise OSError("libcudart.so.13: cannot open shared object file\nand more")

    monkeypatch.setattr(doctor, "import_module", refuse)
    check = look()["peft"]
    assert check.fails and "(OSError: libcudart.so.13: cannot open shared object file)" in check.note


def test_not_installed_as_a_package(look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "metadata", missing)
    check = look()["sqft"]
    assert check.fails and "pip install -e ." in check.note


MORE_PACKAGES = ["torch", "packaging", "rich", "pluggy", "transformers"]


@pytest.mark.parametrize(
    "broken",
    ["pydantic", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_PACKAGES)],
)
def test_it_does_not_crash_where_a_package_is_broken(tmp_path: Path, broken: str) -> None:
    code = f"import sys; sys.modules[{broken!r}] = None\nfrom sqft.cli import main; main(['doctor'])"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert broken in done.stderr and "store:\n  ok  disk" in done.stdout


def test_broken_plugins(look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger's is said; one of sqft's own is a failure."""
    registry = Registry.discover()
    registry._break(Provider("old", "sqft-old 9"), "needs sqft>=9")
    monkeypatch.setattr(Registry, "discover", lambda *_: registry)
    assert look()["old"].state == "wrong" and not look()["old"].fails and "--disable old" in look()["old"].note
    registry._break(Provider("gptq", "sqft 0.1.0"), "could not be loaded")
    assert look()["gptq"].fails
    monkeypatch.setattr(Registry, "discover", lambda *_: Registry())
    assert look()["installed"].fails


def test_cards(look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    card = SimpleNamespace(name="A card", total_memory=80 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (40 << 30, 80 << 30))
    assert look()["cuda:0"].found == "A card, 80.0 GiB, 40.0 GiB free"

    def busy(index: int) -> None:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy")

    monkeypatch.setattr(torch.cuda, "mem_get_info", busy)
    assert "cannot be used (RuntimeError: CUDA error: all" in look()["cuda:0"].found


def test_a_kernel_that_is_wrong_or_missing(
    look: Callable[[], dict[str, Check]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from sqft.modeling.adapters.frozen_weight import PackedWeight

    assert look()["int4 kernel"].state == "ok"
    monkeypatch.setattr(PackedWeight, "linear", lambda self, x, bias: x.new_zeros(1, 16))
    assert "its result is wrong" in look()["int4 kernel"].note

    def missing(self: PackedWeight) -> bool:
        raise NotImplementedError("no kernel for this CPU")

    monkeypatch.setattr(PackedWeight, "prepare_int4_kernel", missing)
    assert "no kernel for this CPU" in look()["int4 kernel"].note and not look()["int4 kernel"].fails


def test_a_store_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    found = {check.name: check for check in checks(tmp_path / "file" / "store")}
    assert found["disk"].fails and "--store" in found["disk"].note
