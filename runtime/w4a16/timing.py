"""Times launches on the GPU: cold weights, random data, CUDA graphs, tactics taking turns.

A launch in a loop reads weights that the L2 still holds and is as slow as its call; neither is so
in a model. Here each launch of a graph reads other bytes, and none of them again before twice the
L2's size has been read; graphs of all tactics under test take turns, so that clocks and neighbours
are the same for all; the median of several rounds counts.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from w4a16 import driver, overlap
from w4a16.arguments import round_up
from w4a16.errors import DeviceError
from w4a16.library import LIBRARY, Problem, QuantOp
from w4a16.tables import Case

#: A result counts as wrong beyond this relative error (Frobenius) against float64: more than twice
#: the largest that any tactic was seen to make where it is accurate (the GEMV, 1.2e-3).
TOLERANCE = 3e-3
SEED = 20250131

_ALIGNMENT = 256
_BLOCK = (32 << 20) + 4096  # of random bytes; no power of two, so that copies of it lie unevenly
_PART_OF_FREE = 0.8
_ROWS = 4
_COLUMNS = 8  # the fewest that a packed weight has

_Array: TypeAlias = "np.ndarray[Any, Any]"


class _Pool:
    """Device memory that only grows, filled with copies of a block of random data."""

    def __init__(self, stream: driver.Stream, block: _Array | None) -> None:
        self.address = 0
        self.bytes = 0
        self._stream = stream
        self._block = None if block is None else np.ascontiguousarray(block).view(np.uint8)

    def reserve(self, size: int) -> int:
        """The address of at least ``size`` bytes."""
        if size > self.bytes:
            self.free()
            size = _aligned(size)
            self.address = driver.allocate(size, self._stream)
            self.bytes = size
            self._fill()
        return self.address

    def _fill(self) -> None:
        if self._block is None:
            return
        first = min(self.bytes, self._block.nbytes)
        driver.copy_to_device(self.address, self._block[:first], self._stream)
        filled = first
        while filled < self.bytes:
            part = min(filled, self.bytes - filled)
            driver.copy(self.address + filled, self.address, part, self._stream)
            filled += part

    def free(self) -> None:
        if self.bytes:
            address, self.address, self.bytes = self.address, 0, 0
            driver.free(address, self._stream)


class Timer:
    """Random operands on one GPU, and the time that a launch on them takes.

    Use as a context manager: it makes the device current and frees its memory at the end.
    """

    def __init__(self, device: int) -> None:
        self.device = device
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Timer:
        LIBRARY.check_device(self.device)
        with contextlib.ExitStack() as stack:
            stack.enter_context(driver.use_device(self.device))
            self._stream = driver.Stream.create()
            stack.callback(self._stream.destroy)
            random = np.random.default_rng(SEED)
            halves = _BLOCK // 8
            self._packed = _Pool(self._stream, random.integers(0, 256, _BLOCK, np.uint8))
            scales = np.exp2(random.uniform(-9, -7, halves)).astype(np.float16)
            self._scales = _Pool(self._stream, scales)
            zeros = random.uniform(-(2**-5), 2**-5, halves).astype(np.float16)
            self._zeros = _Pool(self._stream, zeros)
            rows = random.standard_normal(halves, np.float32).astype(np.float16)
            self._a = _Pool(self._stream, rows)
            self._bias = _Pool(self._stream, rows)
            self._c = _Pool(self._stream, None)
            self._workspace = _Pool(self._stream, None)
            for pool in self._pools():
                stack.callback(pool.free)
            stack.callback(self._stream.synchronize)
            self.l2_bytes = driver.l2_bytes(self.device)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _pools(self) -> tuple[_Pool, ...]:
        return (
            *(self._packed, self._scales, self._zeros, self._a, self._bias),
            *(self._c, self._workspace),
        )

    # ---- Operands ----

    def prepare(self, case: Case, has_bias: bool = False) -> None:
        """Operands of a case: copies of its weights of twice the L2's size and one more."""
        self._case = case
        self._has_bias = has_bias
        groups = 1 if case.quant_op is QuantOp.PER_COLUMN else case.k // case.group_size
        self.packed_bytes = case.n * case.k // 2
        self._packed_step = _aligned(self.packed_bytes)
        self._scales_step = _aligned(groups * case.n * 2)
        self._copies = 2 * self.l2_bytes // self._packed_step + 2
        tables = self._copies * self._scales_step
        self._packed.reserve(self._copies * self._packed_step)
        self._scales.reserve(tables)
        self._zeros.reserve(tables if case.quant_op is QuantOp.GROUP_SCALE_ZERO else 0)
        self._bias.reserve(case.n * 2 if has_bias else 0)
        self._next = 0
        self._expected: dict[int, tuple[_Array, _Array]] = {}

    def why_not(self, m: int) -> str:
        """Why M rows cannot be timed (memory); empty if they can."""
        case = self._case
        more = max(0, m * case.k * 2 - self._a.bytes) + max(0, m * case.n * 2 - self._c.bytes)
        free = driver.memory_info().free
        if more > _PART_OF_FREE * free:
            return f"M = {m} takes {more >> 20} MiB more of device memory, {free >> 20} are free"
        return ""

    def problem(self, m: int) -> Problem:
        case = self._case
        return Problem(
            quant_op=case.quant_op,
            m=m,
            n=case.n,
            k=case.k,
            group_size=case.group_size,
            has_bias=self._has_bias,
        )

    def _launch(
        self, tactic: int, m: int, copy: int, workspace: int, overlaps: bool = False
    ) -> None:
        case = self._case
        zeros = case.quant_op is QuantOp.GROUP_SCALE_ZERO
        LIBRARY.run(
            tactic,
            case.quant_op,
            m,
            case.n,
            case.k,
            case.group_size,
            self._a.address,
            self._packed.address + copy * self._packed_step,
            self._scales.address + copy * self._scales_step,
            self._zeros.address + copy * self._scales_step if zeros else None,
            self._bias.address if self._has_bias else None,
            self._c.address,
            self._workspace.address or None,
            workspace,
            self._stream.handle,
            overlaps,
        )

    def _reserve(self, tactics: Sequence[int], m: int) -> dict[int, int]:
        """Memory for these launches; the bytes of workspace of each."""
        self._a.reserve(m * self._case.k * 2)
        self._c.reserve(m * self._case.n * 2)
        problem = self.problem(m)
        sizes = {tactic: LIBRARY.workspace_size(tactic, problem) for tactic in tactics}
        self._workspace.reserve(max(sizes.values(), default=0))
        return sizes

    # ---- Time ----

    def time(self, tactics: Sequence[int], m: int, *, quick: bool) -> dict[int, float]:
        """Median microseconds of a launch of each tactic."""
        sizes = self._reserve(tactics, m)
        launches, rounds = self.effort(len(tactics), m, quick=quick)
        with contextlib.ExitStack() as stack:
            graphs = {}
            for tactic in tactics:
                # The first launch loads the kernel, which a capture need not allow.
                self._launch(tactic, m, 0, sizes[tactic])
                graph = self._captured(tactic, m, launches, sizes[tactic])
                graphs[tactic] = stack.enter_context(graph)
            times = self._replayed(graphs, rounds)
        return {t: statistics.median(ms) * 1e3 / launches for t, ms in times.items()}

    def effort(self, tactics: int, m: int, *, quick: bool) -> tuple[int, int]:
        """Launches in a graph, and rounds of replays: many where a launch is short."""
        guess = guess_us(self._case, m)
        most, least, rounds = (12, 1, 2) if quick else (40, 2, 7)
        launches = max(least, min(most, math.ceil((120 if quick else 600) / guess)))
        # All graphs of a round together read more than the L2 holds, twice.
        cold = math.ceil(2 * self.l2_bytes / (self._packed_step * max(tactics, 1)))
        launches = max(launches, min(cold, 64))
        if guess > 500:
            rounds = 1 if quick else 5
        return launches, rounds

    def _captured(self, tactic: int, m: int, launches: int, workspace: int) -> driver.Graph:
        with driver.capture(self._stream) as capture:
            for _ in range(launches):
                # All weights were there long before, as in a model.
                self._launch(tactic, m, self._next, workspace, overlap.enabled)
                self._next = (self._next + 1) % self._copies
        return capture.graph

    def _replayed(self, graphs: dict[int, driver.Graph], rounds: int) -> dict[int, list[float]]:
        """Milliseconds of each replay; a round to warm up is left out."""
        *_, last = graphs.values()
        marks = {tactic: (driver.Event.create(), driver.Event.create()) for tactic in graphs}
        times: dict[int, list[float]] = {tactic: [] for tactic in graphs}
        try:
            for turn in range(rounds + 1):
                # While this runs the next graph is put on the stream: an idle GPU would wait for
                # the host between the first event and the first graph.
                last.launch(self._stream)
                for tactic, graph in graphs.items():
                    begin, end = marks[tactic]
                    begin.record(self._stream)
                    graph.launch(self._stream)
                    end.record(self._stream)
                self._stream.synchronize()
                if turn:
                    for tactic, (begin, end) in marks.items():
                        times[tactic].append(end.elapsed_ms(begin))
        finally:
            for pair in marks.values():
                for event in pair:
                    event.destroy()
        return times

    def latency(self, tactic: int, m: int, calls: int = 50) -> tuple[float, float]:
        """Median microseconds of one launch without a graph: of the call, and until it is done."""
        size = self._reserve([tactic], m)[tactic]
        self._launch(tactic, m, 0, size)
        self._stream.synchronize()
        called, done = [], []
        for i in range(calls):
            begin = time.perf_counter_ns()
            self._launch(tactic, m, i % self._copies, size)
            returned = time.perf_counter_ns()
            self._stream.synchronize()
            done.append((time.perf_counter_ns() - begin) / 1e3)
            called.append((returned - begin) / 1e3)
        return statistics.median(called), statistics.median(done)

    # ---- Sanity ----

    def wrong(self, tactic: int, m: int) -> str:
        """What is wrong with a tactic's result; empty if nothing is.

        A few rows, first and last among them, into an output poisoned with NaNs: all finite, and
        three blocks of columns against float64 arithmetic on the stored weights.
        """
        size = self._reserve([tactic], m)[tactic]
        case = self._case
        driver.memset(self._c.address, 0xFF, m * case.n * 2, self._stream)
        self._launch(tactic, m, 0, size)
        rows = sorted({0, m // 3, m - m // 3 - 1, m - 1})[:_ROWS]
        result = np.stack(
            [self._read(self._c.address + row * case.n * 2, case.n, np.float16) for row in rows]
        ).astype(np.float64)
        if not np.isfinite(result).all():
            return f"{int((~np.isfinite(result)).sum())} of {result.size} values are not finite"
        if not self._expected:
            self._expected = {c: self._columns(c) for c in _column_blocks(case.n)}
        error = norm = 0.0
        a = np.stack(
            [self._read(self._a.address + row * case.k * 2, case.k, np.float16) for row in rows]
        ).astype(np.float64)
        for column, (weights, bias) in self._expected.items():
            exact = a @ weights + bias
            error += float(((result[:, column : column + _COLUMNS] - exact) ** 2).sum())
            norm += float((exact**2).sum())
        relative = math.sqrt(error / max(norm, 1e-300))
        return "" if relative <= TOLERANCE else f"relative error {relative:.1e} against float64"

    def _columns(self, column: int) -> tuple[_Array, _Array]:
        """float64 ``[K, 8]`` of the weights of copy 0 from a column on, and their bias."""
        case = self._case
        step = case.k // 2
        packed = self._read(self._packed.address + column * step, _COLUMNS * step, np.uint8)
        plain = np.empty((case.k, _COLUMNS // 2), np.uint8)
        LIBRARY.unpack(packed.ctypes.data, case.k, _COLUMNS, plain.ctypes.data, threads=1)
        q = np.stack([plain & 15, plain >> 4], axis=-1).reshape(case.k, _COLUMNS)
        weights = (q.astype(np.float64) - 8) * self._table(self._scales, column)
        if case.quant_op is QuantOp.GROUP_SCALE_ZERO:
            weights += self._table(self._zeros, column)
        bias = np.zeros(_COLUMNS)
        if self._has_bias:
            bias = self._read(self._bias.address + column * 2, _COLUMNS, np.float16).astype(float)
        return weights, bias

    def _table(self, pool: _Pool, column: int) -> _Array:
        """Scales or zeros of eight columns, a row for each of K."""
        case = self._case
        groups = 1 if case.quant_op is QuantOp.PER_COLUMN else case.k // case.group_size
        table = self._read(pool.address, groups * case.n, np.float16).reshape(groups, case.n)
        part = table[:, column : column + _COLUMNS].astype(np.float64)
        return np.repeat(part, case.k // groups, axis=0)

    def _read(self, address: int, count: int, dtype: Any) -> _Array:
        out = np.empty(count, dtype)
        driver.copy_to_host(out, address, self._stream)
        return out


def _aligned(size: int) -> int:
    return max(round_up(size, _ALIGNMENT), _ALIGNMENT)


def _column_blocks(n: int) -> tuple[int, ...]:
    """Where blocks of eight columns begin: at the start, in the middle, at the end."""
    return tuple(sorted({0, n // 2 // _COLUMNS * _COLUMNS, n - _COLUMNS}))


def guess_us(case: Case, m: int) -> float:
    """About how long a good launch takes on an H200; decides only how many are timed."""
    weights = case.n * case.k / 2
    return 4 + max(weights / 3.5e6, 2 * m * case.n * case.k / 6e8)


def current_device() -> int:
    """The CUDA ordinal of the current device."""
    return driver.current_device()


def refuse_capture() -> None:
    """Raises :class:`w4a16.DeviceError` while a CUDA graph is being captured."""
    if driver.is_capturing():
        raise DeviceError("a CUDA graph is being captured: time tactics before, or after")


def conditions(device: int) -> dict[str, int]:
    """Under what times are measured: the highest clocks, the driver, the L2."""
    return {
        "sm_mhz": driver.clock_khz(device) // 1000,
        "memory_mhz": driver.memory_clock_khz(device) // 1000,
        "l2_bytes": driver.l2_bytes(device),
    }
