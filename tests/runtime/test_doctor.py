"""``w4a16 doctor``: each thing that can be wrong is found, with what to do."""

from __future__ import annotations

import os
import sys
import types
import warnings
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from w4a16 import doctor, driver, info, tactics
from w4a16.doctor import Finding, Machine
from w4a16.errors import DeviceError
from w4a16.library import LIBRARY

from tests.runtime import fake, fake_kernels
from tests.runtime.fake import FakeDriver
from tests.runtime.fake_kernels import FakeKernels

MACHINE = Machine(LIBRARY, "")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDriver]:
    made = fake.install(tmp_path, monkeypatch)
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "cache"))
    tactics.forget()
    yield made
    tactics.forget()


@pytest.fixture
def kernels(gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    return fake_kernels.install(monkeypatch)


def states(findings: Any) -> list[str]:
    return [finding.state for finding in findings]


def only(findings: Any) -> Finding:
    (finding,) = findings
    assert isinstance(finding, Finding)
    assert (finding.state == "ok") == (not finding.advice)
    return finding


# ---- As a whole ----


@pytest.mark.usefixtures("kernels")
def test_a_machine_on_which_all_is_well_has_no_errors() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        findings = doctor.examine()
    assert not doctor.failed(findings), [f for f in findings if f.state == "error"]
    names = {finding.check for finding in findings}
    assert {"numpy", "library", "driver", "GPU 0", "product", "tactics", "cache"} <= names


def test_without_a_driver_the_doctor_says_to_install_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "LIBRARY_NAME", "libcuda-that-is-not-there.so.1")
    monkeypatch.setattr(driver, "_loaded", None)
    findings = doctor.examine()
    wrong = [finding for finding in findings if finding.state == "error"]
    assert [finding.check for finding in wrong] == ["driver"]
    assert "install one (5" in wrong[0].advice


def test_a_check_that_fails_is_a_finding_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(machine: Machine) -> Iterator[Finding]:
        yield Finding(check="first", state="ok", found="fine")
        raise ZeroDivisionError("oh")

    monkeypatch.setattr(doctor, "_CHECKS", (broken, doctor._library))
    findings = doctor.examine()
    assert [finding.check for finding in findings][:3] == ["first", "broken", "library"]
    assert "the check itself failed: ZeroDivisionError: oh" in findings[1].found
    assert doctor.failed(findings)


def test_findings_are_printed_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    doctor.show([
        Finding(check="one", state="ok", found="fine [bold]"),
        Finding(check="other", state="error", found="broken", advice="mend it"),
        Finding(check="third", state="warning", found="odd", advice="look"),
    ])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "ok       one    fine [bold]",
        "error    other  broken",
        "                → mend it",
        "warning  third  odd",
        "                → look",
        "1 error, 1 warning",
    ]
    doctor.show([Finding(check="one", state="ok", found="fine")])
    assert "everything is as it should be" in capsys.readouterr().out


# ---- The package ----


def test_a_library_that_cannot_be_loaded_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("W4A16_LIBRARY")
    found = only(doctor._library(Machine(None, "lib/libw4a16.so is missing")))
    assert (found.state, found.found) == ("error", "lib/libw4a16.so is missing")
    assert "install the wheel anew" in found.advice
    monkeypatch.setenv("W4A16_LIBRARY", "/nowhere")
    assert "unset W4A16_LIBRARY" in only(doctor._library(Machine(None, "it is not there"))).advice


def test_a_library_in_place_of_the_packages_own_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_PACKAGE", tmp_path)
    monkeypatch.setenv("W4A16_LIBRARY", "/other/libw4a16.so")
    assert states(doctor._override(MACHINE)) == ["ok"]
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "libw4a16.so").touch()
    found = only(doctor._override(MACHINE))
    assert (found.state, "/other/libw4a16.so" in found.found) == ("warning", True)
    monkeypatch.delenv("W4A16_LIBRARY")
    assert states(doctor._override(MACHINE)) == []


def test_two_loaded_copies_of_the_library_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [Path(path) for path in doctor.loaded_copies()] == [LIBRARY.path.resolve()]
    assert states(doctor._copies(MACHINE)) == []
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r--p 0 00:00 1   /a/lib/libw4a16.so.1\n"
        "7f01-7f02 r-xp 0 00:00 1   /a/lib/libw4a16.so.1\n"
        "7f03-7f04 r--p 0 00:00 2   /b/libw4a16.so\n"
        "7f05-7f06 r--p 0 00:00 3   /b/libcuda.so.1\n"
    )
    monkeypatch.setattr(doctor, "_MAPS", maps)
    found = only(doctor._copies(MACHINE))
    assert "/a/lib/libw4a16.so.1, /b/libw4a16.so" in found.found


def test_versions_that_differ_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    class Distribution:
        name = "w4a16"

        def __init__(self, place: Path) -> None:
            self.place = place

        def locate_file(self, _: str) -> Path:
            return self.place

    here, elsewhere = Distribution(doctor._PACKAGE.parent), Distribution(Path("/elsewhere"))
    monkeypatch.setattr(info, "distribution_version", lambda *_: LIBRARY.build.version)
    for installed, text in (
        ([], "run from a source tree"),
        ([here], "installed"),
        ([elsewhere], "though w4a16 is installed in /elsewhere"),
        ([here, elsewhere], "installed 2 times"),
    ):
        monkeypatch.setattr(metadata, "distributions", lambda found=installed: found)
        assert text in only(doctor._installation(MACHINE)).found
    monkeypatch.setattr(metadata, "distributions", lambda: [here])
    monkeypatch.setattr(info, "distribution_version", lambda *_: "0.0.1")
    assert "the package is version 0.0.1, the library" in only(doctor._installation(MACHINE)).found


# ---- The machine ----


@pytest.mark.usefixtures("gpu")
def test_a_driver_for_an_older_cuda_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert only(doctor._driver(MACHINE)).state == "ok"
    monkeypatch.setattr(driver, "driver_version", lambda: 11080)
    found = only(doctor._driver(MACHINE))
    assert found.state == "error"
    assert "CUDA up to 11.8; the library was built with CUDA" in found.found
    assert "or a library that was built with CUDA 11" in found.advice


@pytest.mark.usefixtures("kernels")
def test_a_gpu_of_another_architecture_is_an_error_unless_there_is_a_better_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    good = LIBRARY.device(0)
    bad = replace(good, problem="built for sm_90a, this device is sm_89")
    monkeypatch.setattr(LIBRARY, "device", lambda device: bad)
    found = only(doctor._gpu(MACHINE))
    assert found.state == "error"
    assert "this device is sm_89" in found.found
    assert MACHINE.gpus() == []
    monkeypatch.setattr(driver, "device_count", lambda: 2)
    monkeypatch.setattr(driver, "_checked", lambda device: 0)
    monkeypatch.setattr(LIBRARY, "device", lambda device: good if device else bad)
    findings = list(doctor._gpu(MACHINE))
    assert (findings[0].check, findings[0].state) == ("GPU 0", "warning")
    assert not doctor.failed([f for f in findings if f.check == "GPU 0"])
    assert MACHINE.gpus() == [1]


def test_no_visible_gpu_is_an_error(gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    gpu.fail(100)
    found = only(doctor._gpu(MACHINE))
    assert found.state == "error"
    assert "CUDA_VISIBLE_DEVICES hides it (it is '')" in found.advice


@pytest.mark.usefixtures("kernels")
def test_compute_modes_little_memory_and_parts_of_a_gpu_are_noted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert only(doctor._gpu(MACHINE)).advice.startswith("little memory is left")  # 1 MiB
    monkeypatch.setattr(driver, "memory_info", lambda: driver.MemoryInfo(1 << 36, 1 << 37))
    assert only(doctor._gpu(MACHINE)).found.endswith("64.0 GiB of 128.0 GiB free")
    monkeypatch.setattr(driver, "compute_mode", lambda device: "exclusive")
    assert only(doctor._gpu(MACHINE)).state == "warning"
    monkeypatch.setattr(driver, "compute_mode", lambda device: "prohibited")
    assert only(doctor._gpu(MACHINE)).state == "error"
    monkeypatch.setattr(driver, "compute_mode", lambda device: "default")
    monkeypatch.setattr(driver, "device_name", lambda device: "NVIDIA H200 MIG 1g.18gb")
    findings = list(doctor._gpu(MACHINE))
    assert states(findings) == ["ok", "warning"]
    assert "run w4a16 tune" in findings[1].advice


def test_a_wrong_product_is_an_error(kernels: FakeKernels) -> None:
    assert only(doctor._product(MACHINE)).state == "ok"
    kernels.after = lambda tactic, problem, out, address: out.fill(np.nan)
    assert "relative error of inf" in only(doctor._product(MACHINE)).found

    def fail(*_: Any) -> None:
        raise DeviceError("an illegal instruction")

    kernels.after = fail
    found = only(doctor._product(MACHINE))
    assert "failed: an illegal instruction" in found.found
    assert found.state == "error"


# ---- What is around ----


def test_torch_is_looked_at_only_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "distribution_version", lambda *_: "")
    assert only(doctor._torch(MACHINE)).found.startswith("not installed")
    monkeypatch.setattr(info, "distribution_version", lambda *_: "2.9")
    monkeypatch.setitem(sys.modules, "torch", None)
    found = only(doctor._torch(MACHINE))
    assert (found.state, "cannot be imported" in found.found) == ("error", True)
    old: Any = types.ModuleType("torch")
    old.__version__ = "2.1.2+cu121"
    monkeypatch.setitem(sys.modules, "torch", old)
    assert "needs 2.4 or later" in only(doctor._torch(MACHINE)).advice


def test_torch_without_cuda_is_a_warning_and_its_op_is_registered() -> None:
    torch = pytest.importorskip("torch")
    found = only(doctor._torch(MACHINE))
    expected = "warning" if torch.version.cuda is None else "ok"
    assert found.state == expected
    assert torch.ops.w4a16.linear.default is not None


@pytest.mark.usefixtures("kernels")
def test_a_gpu_without_measured_times_is_told_to_tune() -> None:
    found = only(doctor._tactics(MACHINE))
    assert "GPU 0: shipped times: " in found.found
    shipped = tactics.describe(0).shipped
    assert found.state == ("warning" if shipped.startswith("none") else "ok")


@pytest.mark.usefixtures("kernels")
def test_a_damaged_cache_is_a_warning_that_says_which_file() -> None:
    path = tactics.describe(0).path
    assert path is not None
    path.parent.mkdir()
    path.write_text("{")
    tactics.forget()
    findings = list(doctor._tactics(MACHINE))
    assert findings[0].state == "warning"
    assert str(path) in findings[0].found


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "not" / "there"))
    assert only(doctor._cache(MACHINE)).state == "ok"
    assert not (tmp_path / "not").exists()
    (tmp_path / "file").touch()
    monkeypatch.setenv("W4A16_CACHE", str(tmp_path / "file"))
    assert "is not a folder" in only(doctor._cache(MACHINE)).found
    monkeypatch.setenv("W4A16_CACHE", "off")
    assert only(doctor._cache(MACHINE)).state == "warning"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "no permission to write" in doctor.not_writable(tmp_path)


def test_launches_that_wait_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_LAUNCH_BLOCKING", raising=False)
    assert states(doctor._environment(MACHINE)) == []
    monkeypatch.setenv("CUDA_LAUNCH_BLOCKING", "1")
    assert only(doctor._environment(MACHINE)).state == "warning"
