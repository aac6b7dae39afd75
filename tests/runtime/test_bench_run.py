"""A whole run of the benchmark on a GPU that is made up: what is written, and how it ends."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.suite import environment, floor, report, results, run, weights
from benchmarks.suite.contenders import library
from benchmarks.suite.errors import Missing
from benchmarks.suite.results import Read
from tests.unit.bench_results import times
from tests.unit.test_bench_measure import TACTICS, US, FakeGpu, FakeLibrary, FakePeer, FakeRows

CASES = ("4096x4096:g128:m1", "4096x4096:g128:m16", "8192x8192:g64:m8")
ARGUMENTS = [part for name in CASES for part in ("--case", name)]


class Machine(FakeGpu):
    """A GPU as far as a run asks for more than graphs."""

    name, sm_count, l2_bytes, memory, device, handle, uuid = "Test", 132, 60 << 20, 1, 0, 7, ""

    def __init__(self) -> None:
        super().__init__(US)
        self.torch = SimpleNamespace(cuda=SimpleNamespace(empty_cache=lambda: None))


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    gpu = Machine()

    def fake_library(device: int, stream: int, *, everything: bool) -> Any:
        made = FakeLibrary(TACTICS, "gemv")
        made.version = lambda: "1.0"  # type: ignore[attr-defined]
        return made

    def read(gpu: Any, native: Any, weight: Any, rounds: int, warm: int) -> Read:
        return Read(weight=weight.weight, bytes=weight.weight.bytes, setting="s", times=times(3.0))

    monkeypatch.setattr(library, "Library", fake_library)
    monkeypatch.setattr(
        weights, "Weights", lambda torch, weight, l2: SimpleNamespace(weight=weight)
    )
    monkeypatch.setattr(weights, "Rows", FakeRows)
    monkeypatch.setattr(environment, "describe", lambda gpu, clocks: {"device": gpu.name})
    monkeypatch.setattr(floor, "build", lambda nvcc: Path("read.so"))
    monkeypatch.setattr(floor, "Native", lambda path: path)
    monkeypatch.setattr(floor, "measure_empty", lambda *given: times(0.8))
    monkeypatch.setattr(floor, "measure_read", read)
    monkeypatch.setattr(
        floor, "measure_matmul", lambda *given: {"burst": times(1400), "sustained": times(1500)}
    )
    monkeypatch.setattr(run, "peers", lambda: [FakePeer("cublas")])
    return gpu


def session(gpu: Machine, folder: Path, *more: str) -> results.Result:
    options = run.parse([*ARGUMENTS, "--out", str(folder), *more])
    clocks = SimpleNamespace(now=lambda: {"sm_mhz": 1980.0}, problem="", driver=lambda: "1")
    begin = time.monotonic()
    return run._Session(options, run.chosen(options), begin, "bench", gpu, clocks).run()


def test_a_run_measures_every_case_and_writes_what_it_found(
    machine: Machine, tmp_path: Path
) -> None:
    result = session(machine, tmp_path)
    assert [case.case.name for case in result.cases] == list(CASES)
    assert [str(read.weight) for read in result.reads] == ["4096x4096:g128", "8192x8192:g64"]
    assert result.left_out == ()
    assert result.contenders == {"library": "1.0", "cublas": "1"}
    assert result.floor(result.cases[0].case, "burst") == pytest.approx(3.0)
    assert results.dumps(results.load(tmp_path / "result.json")) == results.dumps(result)
    text = report.markdown(result)
    assert "Median microseconds of a launch over 7 replays (5 from M = 512 on)" in text
    assert "| 1 | 1 | 0.750 |" in text


def test_at_the_limit_it_stops_cleanly_and_says_what_is_missing(
    machine: Machine, tmp_path: Path
) -> None:
    result = session(machine, tmp_path, "--limit", "1e-9")
    assert result.cases == ()
    assert result.left_out == tuple(f"{name}: out of time" for name in CASES)
    assert "out of time" in report.markdown(results.load(tmp_path / "result.json"))


def test_a_weight_that_does_not_fit_leaves_out_its_cases_alone(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(torch: Any, weight: Any, l2: int) -> Any:
        if weight.n == 4096:
            raise RuntimeError("CUDA out of memory")
        return SimpleNamespace(weight=weight)

    monkeypatch.setattr(weights, "Weights", made)
    result = session(machine, tmp_path)
    assert [case.case.name for case in result.cases] == [CASES[2]]
    assert result.left_out[0] == f"{CASES[0]}: RuntimeError: CUDA out of memory"


def test_a_lost_gpu_ends_the_run_with_what_there_is(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = machine.rounds

    def rounds(*given: Any, **more: Any) -> Any:
        if len(machine.rounds_of) > 4:
            machine.lost = True
            raise RuntimeError("an illegal memory access was encountered")
        return real(*given, **more)

    monkeypatch.setattr(machine, "rounds", rounds)
    result = session(machine, tmp_path)
    assert 0 < len(result.cases) < len(CASES)
    assert any("context was lost" in note for note in result.notes)
    missing = {name for name in CASES if not any(c.case.name == name for c in result.cases)}
    assert {text.rpartition(": ")[0] for text in result.left_out} == missing
    assert (tmp_path / "result.json").is_file()


def test_without_a_floor_times_are_still_there(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(nvcc: str) -> Path:
        raise Missing("no nvcc: put it on PATH")

    monkeypatch.setattr(floor, "build", none)
    result = session(machine, tmp_path)
    assert result.reads == ()
    assert result.floor(result.cases[0].case, "burst") is None
    assert any("no nvcc" in note for note in result.notes)
    assert "`decode:a + overlap`" in report.markdown(result)
