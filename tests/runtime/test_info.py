"""``w4a16 info``: what it says with and without a library, a driver and a wheel."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from w4a16 import driver, info, tactics
from w4a16.library import LIBRARY

from tests.runtime import fake, fake_kernels


@pytest.fixture
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY_NAME", "libcuda-that-is-not-there.so.1")
    monkeypatch.setattr(driver, "_loaded", None)


@pytest.fixture
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    fake.install(tmp_path, monkeypatch)
    fake_kernels.install(monkeypatch)
    monkeypatch.setenv("W4A16_CACHE", "off")
    tactics.forget()
    yield
    tactics.forget()


@pytest.mark.usefixtures("no_driver")
def test_without_a_driver_the_library_and_its_tactics_are_described() -> None:
    found = info.gather()
    library = found["library"]
    build = LIBRARY.build
    assert library["path"] == str(LIBRARY.path)
    for name in ("version", "profile", "release", "trtllm_commit", "cutlass_commit"):
        assert library[name] == getattr(build, name)
    for name in ("bundle_digest", "compiler", "architecture", "api_version", "gemv_reason"):
        assert library[name] == getattr(build, name)
    major, minor = library["cuda_runtime"].split(".")
    assert int(major) * 1000 + int(minor) * 10 == build.cuda_runtime_version
    assert [tactic["name"] for tactic in library["tactics"]] == list(LIBRARY.tactic_index)
    assert found["gpus"] == []
    assert "no NVIDIA driver" in found["driver"]["error"]
    json.dumps(found)


@pytest.mark.usefixtures("one_gpu")
def test_a_gpu_is_described_with_where_its_tactics_come_from() -> None:
    found = info.gather()
    (gpu,) = found["gpus"]
    assert (gpu["device"], gpu["name"], gpu["sm_count"]) == (0, "Fake H200", 132)
    assert (gpu["compute_capability"], gpu["compute_mode"]) == ("9.0", "default")
    assert gpu["memory_bytes"] == 1 << 30
    assert gpu["problem"] == ""
    assert "off" in gpu["tactics"]["cache"]
    assert found["driver"]["cuda"] == "13.0"


@pytest.mark.usefixtures("one_gpu")
def test_the_page_for_people_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    info.show(info.gather())
    page = capsys.readouterr().out
    for text in (LIBRARY.build.trtllm_commit, LIBRARY.build.compiler, "Fake H200", "CUDA up to 13"):
        assert text in page
    for tactic in LIBRARY.tactics:
        assert tactic.name in page
    assert "run from a source tree" in page


def test_frameworks_are_not_imported() -> None:
    code = (
        "import sys; from w4a16 import info; info.gather();"
        " assert not {'torch', 'cupy', 'jax', 'numba', 'rich'} & set(sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(info.__file__).resolve().parent.parent)}
    subprocess.run([sys.executable, "-c", code], env=env, check=True)


def test_provenance_is_shown_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "_PACKAGE", tmp_path)
    assert info.provenance() is None
    file = tmp_path / "data" / "provenance.json"
    file.parent.mkdir()
    made = {"project": {"commit": "abc123", "dirty": True}, "policy": "manylinux_2_34"}
    file.write_text(json.dumps(made))
    assert info.provenance() == made
    info.show(info.gather())
    page = capsys.readouterr().out
    assert "made from abc123, with changes" in page
    assert "manylinux_2_34" in page
    for damaged in ("{", "[]", "\x00"):
        file.write_text(damaged)
        assert str(file) in (info.provenance() or {})["error"]
        info.show(info.gather())


def test_the_drivers_version_is_read_from_the_kernel_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    monkeypatch.setattr(info, "_KERNEL_MODULE", file)
    assert info._module_version() == ""
    for line in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.82.07  Wed Aug 27 17:21:32 UTC 2025\n",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build (x)\n",
    ):
        file.write_text(line + "GCC version:  gcc version 12.3.0\n")
        assert info._module_version() == "580.82.07"


def test_a_missing_library_is_said_and_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(info, "loaded_library", lambda: (None, "libw4a16.so is missing"))
    found = info.gather()
    assert found["library"] == {"error": "libw4a16.so is missing"}
    info.show(found)
    assert "none: libw4a16.so is missing" in capsys.readouterr().out
