"""Killed at any moment, or two at once: the next run, and each of them, comes to a sound end."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.elf import read_elf
from tests.integration.forge import Site, contents

Fresh = Callable[..., Site]
SEED = 20260


def start(site: Site, stage: str, log: Path) -> subprocess.Popen[str]:
    with log.open("a", encoding="utf-8") as stream:
        return site.forge.start(stage, *site.arguments(), log=stream)


def kill(process: subprocess.Popen[str]) -> None:
    """kill -9 of the command alone, as the kernel does when memory runs out."""
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> bool:
    """Whether ``reached`` came to be while ``process`` ran."""
    while process.poll() is None:
        if reached():
            return True
        time.sleep(0.01)
    return reached()


def test_extract_killed_at_random_moments_goes_on_to_the_same_bundle(
    small: Site, fresh: Fresh, tmp_path: Path
) -> None:
    site = fresh(own_vendor=True)
    chance = random.Random(SEED)
    for _ in range(7):
        process = start(site, "extract", tmp_path / "log")
        time.sleep(chance.uniform(0.4, 2.0))
        kill(process)
    site.extract()
    assert contents(site.source) == contents(small.source)
    assert site.manifest["bundle"] == small.manifest["bundle"]
    assert site.extract().says("render: unchanged, skipped")
    assert leftovers(site.folder) == []


@pytest.mark.parametrize(
    "moment", ["vendor/stores", "run/.generated.new-*", "run/.state/probe", "run/source/src"]
)
def test_extract_killed_as_a_stage_begins_to_write_goes_on_to_the_same_bundle(
    small: Site, fresh: Fresh, tmp_path: Path, moment: str
) -> None:
    site = fresh(own_vendor=True).elsewhere(tmp_path / "run")
    (tmp_path / "vendor").symlink_to(site.vendor)
    process = start(site, "extract", tmp_path / "log")
    assert wait_for(process, lambda: any(tmp_path.glob(moment))), moment
    kill(process)
    assert not (site.folder / ".state/render.json").exists()
    site.extract()
    assert contents(site.source) == contents(small.source)
    assert leftovers(site.folder) == []


def test_a_build_killed_at_several_moments_goes_on_to_the_same_library(
    small: Site, fresh: Fresh, tmp_path: Path
) -> None:
    site = fresh()
    site.extract()
    log = tmp_path / "log"
    moments: list[Callable[[], bool]] = [
        lambda: (site.folder / "build/CMakeFiles").is_dir(),  # CMake configures
        lambda: len(site.compiled()) >= 3,
        lambda: len(site.compiled()) >= 12,
        lambda: any(site.folder.glob("build/CMakeFiles/w4a16_gemm.dir/**/*.o")),
        lambda: (site.folder / "build/libw4a16.so").exists(),
    ]
    for reached in moments:
        process = start(site, "build", log)
        assert wait_for(process, reached), log.read_text(encoding="utf-8")
        kill(process)
        assert not (site.folder / ".state/build.json").exists()
    before = site.compiled()
    result = site.build()
    assert result.says("checks passed")
    again = {name for name in before if site.compiled()[name] != before[name]}
    assert len(again) <= 3, "what was compiled before the kill is kept"
    assert library(site) == library(small)
    assert leftovers(site.folder / "dist") == []


def test_a_terminated_build_says_so_and_leaves_no_compiler_running(
    small: Site, tmp_path: Path
) -> None:
    wrapper = small.source / "src/gemm/gemm_gs_64x32x64_1x1x1.cu"
    wrapper.write_text(wrapper.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
    installed = contents(small.install, times=True)
    log = tmp_path / "log"
    process = start(small, "build", log)
    assert wait_for(process, lambda: bool(compilers(small))), log.read_text(encoding="utf-8")
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=30) == 130
    assert "interrupted; the next run goes on" in log.read_text(encoding="utf-8")
    assert compilers(small) == []
    assert contents(small.install, times=True) == installed


def test_two_runs_on_one_folder_take_turns_and_both_succeed(
    small: Site, fresh: Fresh, tmp_path: Path
) -> None:
    site = fresh(own_vendor=True)
    logs = [tmp_path / f"{index}.log" for index in range(3)]
    runs = [start(site, "extract", log) for log in logs]
    assert [run.wait() for run in runs] == [0, 0, 0], "\n".join(map(Path.read_text, logs))
    assert contents(site.source) == contents(small.source)

    # Now builds, on a folder that has everything but one unit.
    wrapper = small.source / "src/gemm/gemm_gs_64x32x64_1x1x1.cu"
    wrapper.write_text(wrapper.read_text(encoding="utf-8") + "// changed\n", encoding="utf-8")
    logs = [tmp_path / f"build-{index}.log" for index in range(2)]
    runs = [start(small, "build", log) for log in logs]
    assert [run.wait() for run in runs] == [0, 0], "\n".join(map(Path.read_text, logs))
    texts = [log.read_text(encoding="utf-8") for log in logs]
    assert sum("build: unchanged, skipped" in text for text in texts) == 1
    assert sum("waiting for another run" in text for text in texts) == 1
    assert small.info()["bundle_digest"].endswith("-dirty")
    assert all(check["ok"] for check in small.report["verification"]["checks"])


def test_runs_on_different_folders_share_the_checkouts_without_harm(
    small: Site, demo: Site, fresh: Fresh, tmp_path: Path
) -> None:
    first = fresh("first", own_vendor=True)
    second = first.elsewhere(tmp_path / "second")
    third = first.elsewhere(tmp_path / "third", config=demo.config)
    runs = [start(site, "extract", tmp_path / "log") for site in (first, second, third)]
    assert [run.wait() for run in runs] == [0, 0, 0], (tmp_path / "log").read_text()
    assert contents(first.source) == contents(small.source)
    assert contents(second.source) == contents(small.source)
    assert contents(third.source) == contents(demo.source)


def library(site: Site) -> tuple[str, ...]:
    """What of a library must not depend on how often its build was interrupted."""
    facts = read_elf(site.library)
    kernels = [f"{k['kernel']} {k['code_bytes']}" for k in site.report["kernels"]]
    return (*facts.exported, *kernels, str(facts.size), site.info()["bundle_digest"])


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders that no run needs any more."""
    return [
        path.relative_to(folder).as_posix()
        for path in folder.rglob(".*")
        if ".new-" in path.name or path.name.endswith(".old")
    ]


def compilers(site: Site) -> list[str]:
    """Command lines of compilers that work on the site now."""
    found = []
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = place.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(site.folder) in text and ("cicc" in text or "cc1plus" in text or "nvcc " in text):
            found.append(text)
    return found
