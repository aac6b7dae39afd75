"""Timing launches on the GPU: what is timed is a real product on cold weights."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from w4a16 import driver, tables, tactics
from w4a16.library import LIBRARY, QuantOp
from w4a16.tables import Case
from w4a16.timing import Timer, conditions, current_device, guess_us

SMALL = Case(QuantOp.GROUP_SCALE, 128, 1032, 1024)
CASES = (
    SMALL,
    Case(QuantOp.GROUP_SCALE, 64, 1032, 1024),
    Case(QuantOp.GROUP_SCALE_ZERO, 128, 1032, 1024),
    Case(QuantOp.PER_COLUMN, 0, 1032, 1024),
)


@pytest.fixture(scope="module")
def timer(gpu: None) -> Iterator[Timer]:
    with Timer(current_device()) as made:
        yield made


def running(timer: Timer, m: int) -> list[int]:
    problem = timer.problem(m)
    return [t.index for t in LIBRARY.tactics if not LIBRARY.why_unsupported(t.index, problem)]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_every_tactic_gives_what_float64_gives(timer: Timer, case: Case, bias: bool) -> None:
    timer.prepare(case, bias)
    for m in (1, 2, 15, 16, 100, 513):
        wrong = {LIBRARY.tactics[t].name: timer.wrong(t, m) for t in running(timer, m)}
        assert not any(wrong.values()), (m, wrong)
        assert wrong


def test_rows_that_were_not_written_are_seen(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    timer.prepare(SMALL)
    launch = timer._launch
    monkeypatch.setattr(timer, "_launch", lambda t, m, *more: launch(t, m - 1, *more))
    assert "not finite" in timer.wrong(LIBRARY.auto_tactic(timer.problem(64)), 64)


def test_results_of_other_weights_are_seen(timer: Timer, monkeypatch: pytest.MonkeyPatch) -> None:
    timer.prepare(SMALL)
    launch = timer._launch
    monkeypatch.setattr(timer, "_launch", lambda t, m, copy, size: launch(t, m, copy + 1, size))
    assert "relative error" in timer.wrong(LIBRARY.auto_tactic(timer.problem(64)), 64)


def test_all_tactics_have_a_time_and_it_is_printed(
    timer: Timer, capsys: pytest.CaptureFixture[str]
) -> None:
    timer.prepare(Case(QuantOp.GROUP_SCALE, 128, 4096, 4096))
    lines = []
    for m in (1, 16, 1024):
        for quick in (True, False):
            times = timer.time(running(timer, m), m, quick=quick)
            assert list(times) == running(timer, m)
            assert all(math.isfinite(us) and us > 0 for us in times.values())
            best = min(times, key=lambda t: times[t])
            guess = guess_us(timer._case, m)
            lines.append(
                f"M = {m}, {'quick' if quick else 'proper'}: {LIBRARY.tactics[best].name}"
                f" {times[best]:.2f} us (guessed {guess:.2f}), slowest {max(times.values()):.2f}"
            )
    with capsys.disabled():
        print("", *lines, sep="\n")


@pytest.mark.parametrize("shape", [(1024, 1024), (4096, 4096), (28672, 8192)])
def test_weights_are_rotated_past_the_l2(timer: Timer, shape: tuple[int, int]) -> None:
    timer.prepare(Case(QuantOp.GROUP_SCALE, 128, *shape))
    assert (timer._copies - 1) * timer._packed_step >= 2 * timer.l2_bytes
    for tactic_count in (1, 5, 22):
        for quick in (False, True):
            launches, rounds = timer.effort(tactic_count, 1, quick=quick)
            assert launches >= 1
            assert rounds >= 1


def test_calls_without_a_graph_have_a_time(
    timer: Timer, capsys: pytest.CaptureFixture[str]
) -> None:
    timer.prepare(SMALL)
    called, done = timer.latency(LIBRARY.auto_tactic(timer.problem(1)), 1)
    assert 0 < called <= done
    with capsys.disabled():
        print(f"\ncall {called:.1f} us, until done {done:.1f} us; {conditions(timer.device)}")


def test_too_many_rows_for_the_memory_are_refused_with_a_reason(timer: Timer) -> None:
    timer.prepare(Case(QuantOp.GROUP_SCALE, 128, 28672, 8192))
    assert timer.why_not(1) == ""
    assert "device memory" in timer.why_not(2**24)


def test_its_memory_is_given_back_and_the_context_is_as_before() -> None:
    device = current_device()
    with driver.use_device(device):
        driver.synchronize()
        before = driver.memory_info().free
        with Timer(device) as timer:
            timer.prepare(Case(QuantOp.GROUP_SCALE, 128, 28672, 8192))
            timer.time([LIBRARY.auto_tactic(timer.problem(256))], 256, quick=True)
        driver.synchronize()
        after = driver.memory_info().free
    assert before - after <= driver.POOL_BYTES + (64 << 20), "kept more than the pool may"


def test_a_thread_without_a_context_can_time(capsys: pytest.CaptureFixture[str]) -> None:
    found: list[Any] = []

    def work() -> None:
        with Timer(0) as timer:
            timer.prepare(SMALL)
            found.append(timer.time([LIBRARY.auto_tactic(timer.problem(8))], 8, quick=True))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert len(found) == 1


def test_what_a_look_up_costs_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    import timeit

    look_up = tactics.plan
    look_up(0, 1, 7, 4096, 4096, 128, False)
    runs = timeit.repeat(lambda: look_up(0, 1, 7, 4096, 4096, 128, False), number=20000, repeat=5)

    def anew() -> None:
        tactics._plans.clear()
        look_up(0, 1, 7, 4096, 4096, 128, False)

    first = timeit.repeat(anew, number=20, repeat=5)
    with capsys.disabled():
        print(
            f"\nlooking up a known plan {min(runs) / 20000 * 1e9:.0f} ns, a new one"
            f" {min(first) / 20 * 1e6:.0f} us; {tables.BUCKETS[-1]} rows at most apart"
        )
