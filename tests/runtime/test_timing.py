"""The timer's operands and checks, on a driver and a library that compute on the host."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from w4a16 import driver, timing
from w4a16.errors import DeviceError
from w4a16.library import LIBRARY, QuantOp
from w4a16.tables import Case
from w4a16.timing import Timer

CASES = (
    Case(QuantOp.GROUP_SCALE, 128, 264, 512),
    Case(QuantOp.GROUP_SCALE_ZERO, 64, 1032, 256),
    Case(QuantOp.PER_COLUMN, 0, 8, 64),
)


class HostStream:
    handle = 7

    @classmethod
    def create(cls) -> HostStream:
        return cls()

    def synchronize(self) -> None: ...

    def destroy(self) -> None: ...


class HostEvent:
    at = 0.0

    @classmethod
    def create(cls) -> HostEvent:
        return cls()

    def record(self, stream: Any) -> None:
        self.at = HostDriver.clock

    def elapsed_ms(self, begin: HostEvent) -> float:
        return self.at - begin.at

    def destroy(self) -> None: ...


class HostGraph:
    """Each tactic takes a microsecond more than the one before it, and 10 at least."""

    def __init__(self, launches: list[int]) -> None:
        self.launches = launches

    def launch(self, stream: Any) -> None:
        HostDriver.clock += sum(0.010 + 0.001 * tactic for tactic in self.launches)

    def __enter__(self) -> HostGraph:
        return self

    def __exit__(self, *_: object) -> None: ...


class HostCapture:
    graph: HostGraph


class HostDriver:
    """What the timer asks of :mod:`w4a16.driver`; memory is the host's."""

    Stream = HostStream
    Event = HostEvent
    Graph = HostGraph
    clock = 0.0
    captured: list[int] | None = None
    memory: dict[int, Any]

    def __init__(self) -> None:
        self.memory = {}

    @contextlib.contextmanager
    def capture(self, stream: Any) -> Iterator[HostCapture]:
        made = HostCapture()
        self.captured = []
        yield made
        made.graph, self.captured = HostGraph(self.captured), None

    @contextlib.contextmanager
    def use_device(self, device: int) -> Iterator[None]:
        yield

    def allocate(self, size: int, stream: Any) -> int:
        block = np.full(size + 256, 0xEE, np.uint8)
        address = -(-block.ctypes.data // 256) * 256
        self.memory[address] = block
        return int(address)

    def free(self, address: int, stream: Any) -> None:
        del self.memory[address]

    def copy_to_device(self, address: int, array: Any, stream: Any) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def copy_to_host(self, array: Any, address: int, stream: Any) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, target: int, source: int, size: int, stream: Any) -> None:
        ctypes.memmove(target, source, size)

    def memset(self, address: int, value: int, size: int, stream: Any) -> None:
        ctypes.memset(address, value, size)

    def l2_bytes(self, device: int) -> int:
        return 1 << 20

    def memory_info(self) -> driver.MemoryInfo:
        return driver.MemoryInfo(1 << 30, 2 << 30)


class HostLibrary:
    """``run`` as :mod:`w4a16.h` says, in float32."""

    tactics = LIBRARY.tactics
    unpack = LIBRARY.unpack

    def __init__(self, host: HostDriver) -> None:
        self.host = host
        self.spoil = ""
        self.weights: set[int] = set()

    def check_device(self, device: int) -> None: ...

    def workspace_size(self, tactic: int, problem: Any) -> int:
        return 1000

    def run(self, tactic: int, op: int, m: int, n: int, k: int, group: int, *rest: Any) -> None:
        a, b, scales, zeros, bias, c, workspace, size, _, overlap = rest
        assert overlap == (self.host.captured is not None), "as a model's launches in a graph"
        assert all(address % 256 == 0 for address in (a, b, scales, zeros or 0, c, workspace))
        assert size == 1000
        self.weights.add(b)
        if self.host.captured is not None:
            self.host.captured.append(tactic)
            return
        groups = k // group if group else 1
        plain = np.empty((k, n // 2), np.uint8)
        LIBRARY.unpack(b, k, n, plain.ctypes.data, threads=1)
        weights = np.stack([plain & 15, plain >> 4], -1).reshape(k, n).astype(np.float32) - 8
        weights *= np.repeat(halves(scales, groups, n), k // groups, 0)
        if zeros:
            weights += np.repeat(halves(zeros, groups, n), k // groups, 0)
        out = halves(a, m, k) @ weights.astype(np.float16).astype(np.float32)
        if bias:
            out += halves(bias, 1, n)
        if self.spoil == "column":
            out[:, n - 1] *= 2
        result = out[: m - 1 if self.spoil == "row" else m].astype(np.float16)
        ctypes.memmove(c, result.ctypes.data, result.nbytes)


def halves(address: int, rows: int, columns: int) -> Any:
    count = rows * columns * 2
    memory = ctypes.string_at(address, count)
    return np.frombuffer(memory, np.float16).reshape(rows, columns).astype(np.float32)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostDriver:
    made = HostDriver()
    monkeypatch.setattr(timing, "driver", made)
    monkeypatch.setattr(timing, "_BLOCK", (1 << 20) + 4096)
    return made


@pytest.fixture
def library(host: HostDriver, monkeypatch: pytest.MonkeyPatch) -> HostLibrary:
    made = HostLibrary(host)
    monkeypatch.setattr(timing, "LIBRARY", made)
    return made


@pytest.mark.parametrize("bias", [False, True])
def test_a_right_result_is_right_and_a_wrong_one_is_not(library: HostLibrary, bias: bool) -> None:
    with Timer(0) as timer:
        for case in CASES:
            timer.prepare(case, bias)
            for m in (1, 2, 7, 100):
                library.spoil = ""
                assert timer.wrong(0, m) == "", (case, m)
                library.spoil = "column"
                assert "relative error" in timer.wrong(0, m), (case, m)
                library.spoil = "row"
                assert "not finite" in timer.wrong(0, m), (case, m)


def test_times_are_those_of_a_launch_and_each_launch_reads_other_weights(
    library: HostLibrary,
) -> None:
    with Timer(0) as timer:
        timer.prepare(CASES[0])
        for quick in (True, False):
            library.weights.clear()
            times = timer.time([0, 1, 2], 4, quick=quick)
            assert times == pytest.approx({0: 10.0, 1: 11.0, 2: 12.0})
            launches, _ = timer.effort(3, 4, quick=quick)
            assert len(library.weights) == min(3 * launches, timer._copies)
        together = len(library.weights) * timer.packed_bytes
        assert together >= 2 * timer.l2_bytes


def test_all_memory_is_given_back_even_after_an_error(
    host: HostDriver, library: HostLibrary
) -> None:
    with Timer(0) as timer:
        timer.prepare(CASES[1], True)
        timer.time([0], 300, quick=True)
        assert len(host.memory) == 7
    assert not host.memory
    with pytest.raises(DeviceError, match="lost"):
        time_and_fail()
    assert not host.memory


def time_and_fail() -> None:
    with Timer(0) as timer:
        timer.prepare(CASES[0])
        raise DeviceError("the context is lost")


def test_rows_beyond_the_memory_are_refused_with_a_reason(library: HostLibrary) -> None:
    with Timer(0) as timer:
        timer.prepare(CASES[0])
        assert timer.why_not(1000) == ""
        assert "device memory" in timer.why_not(10**6)


def test_a_capture_is_refused(host: HostDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "is_capturing", lambda: True, raising=False)
    with pytest.raises(DeviceError, match="captured"):
        timing.refuse_capture()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_more_work_is_launched_fewer_times(library: HostLibrary, case: Case) -> None:
    with Timer(0) as timer:
        timer.prepare(case)
        for quick in (True, False):
            efforts = [timer.effort(5, m, quick=quick) for m in (1, 1000, 10**6, 10**8)]
            assert efforts == sorted(efforts, reverse=True)
            assert all(launches >= 1 and rounds >= 1 for launches, rounds in efforts)
