"""The benchmark itself on a GPU: a tiny case, all the way to its report."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.suite import results
from benchmarks.suite.cases import Weight

from .library import ROOT, Library, find_library

CASES = ("1024x1024:g128:zeros:m1", "1024x1024:g128:m1", "1024x1024:g128:m32")


def bench(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "W4A16_LIBRARY": str(find_library())}
    command = [sys.executable, "-m", "benchmarks.suite", "--out", str(folder), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def measured(
    library: Library, gpu: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[results.Result, Path]:
    folder = tmp_path_factory.mktemp("bench")
    chosen = [part for name in CASES for part in ("--case", name)]
    done = bench(folder, *chosen, "--without", "gemlite", "--no-plots")
    assert done.returncode == 0, done.stdout + done.stderr
    return results.load(folder / "result.json"), folder


def test_every_tactic_on_a_tiny_case_is_right_and_timed(
    measured: tuple[results.Result, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    result, folder = measured
    assert {case.case.name for case in result.cases} == set(CASES)
    for case in result.cases:
        mine = [line for line in case.lines if line.role != "peer"]
        assert mine
        assert case.auto in {line.contender for line in mine}
        for line in mine:
            assert (line.status, line.note) == ("ok", ""), line
            assert line.burst is not None
            assert (line.sustained is not None) == (case.case.m >= 16)
    with capsys.disabled():
        print("\n" + (folder / "report.md").read_text(encoding="utf-8"))


def test_fp16_through_torch_takes_part_in_a_graph(
    measured: tuple[results.Result, Path],
) -> None:
    for case in measured[0].cases:
        (line,) = (line for line in case.lines if line.contender == "cublas")
        assert (line.status, line.method) == ("ok", "graph"), line.note


def test_no_peer_that_is_there_is_wrong(measured: tuple[results.Result, Path]) -> None:
    lines: list[Any] = [line for case in measured[0].cases for line in case.lines]
    wrong = [line for line in lines if line.role == "peer" and line.status == "wrong"]
    assert not wrong


def test_the_floor_is_in_microseconds_and_the_rate_in_teraflops(
    measured: tuple[results.Result, Path],
) -> None:
    result = measured[0]
    if shutil.which("nvcc") is None and not result.reads:
        pytest.skip("no nvcc, and so no read kernel")
    assert {read.weight for read in result.reads} == {
        Weight(1024, 1024, 128),
        Weight(1024, 1024, 128, True),
    }
    assert result.empty is not None
    rate = result.tflops("burst")
    assert rate is not None
    assert 100 < rate < 2000
    for case in result.cases:
        floor = result.floor(case.case, "burst")
        assert floor is not None
        assert floor > result.empty.median
        for line in case.lines:
            assert line.burst is None or line.burst.median > 0.5 * floor


def test_the_latency_of_a_case_is_a_distribution(
    library: Library, gpu: None, tmp_path: Path
) -> None:
    done = bench(tmp_path, "--latency", CASES[1], "--samples", "50", "--no-peers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "P99" in (tmp_path / "latency.md").read_text(encoding="utf-8")
