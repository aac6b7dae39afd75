"""How a case is measured: with a GPU, a library and peers that are made up."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.suite.cases import Case, Job, Weight
from benchmarks.suite.clocks import Clocks
from benchmarks.suite.contenders.base import Run
from benchmarks.suite.contenders.library import hopeless
from benchmarks.suite.errors import Lost, Missing
from benchmarks.suite.measure import Bench, Method, by_weight, finalists
from benchmarks.suite.results import CaseResult, Line, Role, Times

WEIGHT = Weight(4096, 4096, 128)


@dataclass
class FakeReplay:
    us: float
    label: str
    launches: int
    method: str = "graph"
    outputs: list[Any] = field(default_factory=list)
    closed: bool = False

    def launch(self) -> None:
        """Nothing to run."""

    def close(self) -> None:
        self.closed = True


class FakeGpu:
    """Takes so long for each launch as a table says; a launch tells its label."""

    def __init__(self, us: dict[str, float]) -> None:
        self.us = us
        self.replays: list[FakeReplay] = []
        self.rounds_of: list[tuple[list[str], int, int]] = []
        self.did: list[str] = []
        self.lost = False

    def synchronize(self) -> None:
        if self.lost:
            raise RuntimeError("an illegal memory access was encountered")

    def capture(self, launch: Any, launches: int, *, torch_graph: bool = False) -> FakeReplay:
        label = launch(0)
        if label == "uncapturable":
            raise RuntimeError("operation not permitted when stream is capturing")
        return self._replay(label, launches, "graph")

    def eager(self, launch: Any, launches: int) -> FakeReplay:
        return self._replay(launch(0), launches, "calls one by one")

    def _replay(self, label: str, launches: int, method: str) -> FakeReplay:
        outputs = [label] * launches
        made = FakeReplay(self.us.get(label, 10.0), label, launches, method, outputs)
        self.replays.append(made)
        return made

    def rounds(
        self, replays: Sequence[FakeReplay], rounds: int, warm: int, pause: float = 0.0
    ) -> list[Times]:
        self.rounds_of.append(([replay.label for replay in replays], rounds, warm))
        self.did.append("rounds after pauses" if pause else "rounds")
        return [Times((replay.us,) * rounds) for replay in replays]

    def busy(self, replays: Sequence[FakeReplay], seconds: float) -> None:
        self.did.append("busy")


class FakeRows:
    slots = 2
    launches = 40

    def __init__(self, weights: Any, m: int) -> None:
        self.m = m
        self.out = ["slot 0", "slot 1"]

    def poison(self) -> None:
        """Nothing to spoil."""

    def error(self, result: str, slot: int) -> float:
        return {"wrong": 0.5, "nan": math.inf}.get(result, 3e-4)


def run_of(name: str, role: Role = "peer", **more: Any) -> Run:
    overlap = bool(more.get("overlap"))
    label = name + (" + overlap" if overlap else "")
    return Run(contender=name, role=role, launch=lambda i: label, **more)


class FakeLibrary:
    everything = False

    def __init__(self, runs: Sequence[Run], auto: str) -> None:
        self._runs, self._auto = list(runs), auto

    def auto(self, case: Case) -> tuple[str, str]:
        return self._auto, "measured"

    def prepare(self, weights: Any) -> FakeLibrary:
        return self

    def runs(self, rows: Any) -> list[Run]:
        return self._runs


@dataclass
class FakePeer:
    name: str
    run: Any = None
    fails: Exception | None = None
    prepared: int = 0

    def version(self) -> str:
        return "1"

    def warm(self, jobs: Sequence[Job]) -> None:
        """Nothing to compile."""

    def prepare(self, weights: Any) -> FakePeer:
        self.prepared += 1
        if self.fails:
            raise self.fails
        return self

    def runs(self, rows: Any) -> list[Run]:
        return [self.run or run_of(self.name)]


TACTICS = [
    run_of("decode:a", "ours", kind="decode"),
    run_of("decode:a", "ours", kind="decode", overlap=True),
    run_of("decode:b", "ours", kind="decode"),
    run_of("decode:b", "ours", kind="decode", overlap=True),
    run_of("gemm:x", "upstream", kind="gemm"),
    run_of("gemm:y", "upstream", kind="gemm"),
    run_of("gemm:z", "upstream", kind="gemm"),
    run_of("gemv", "upstream", kind="gemv"),
]
US = {
    "decode:a": 5.0,
    "decode:a + overlap": 4.0,
    "decode:b": 6.0,
    "decode:b + overlap": 5.5,
    "gemm:x": 15.0,
    "gemm:y": 16.0,
    "gemm:z": 90.0,
    "gemv": 7.0,
    "cublas": 13.0,
    "slow": 40.0,
}


RANKED = sorted(((run, US[run.label]) for run in TACTICS), key=lambda pair: pair[1])


def bench(gpu: FakeGpu, peers: Sequence[FakePeer], auto: str = "gemm:y", **more: Any) -> Bench:
    made = Bench(
        gpu,
        more.pop("library", FakeLibrary(TACTICS, auto)),
        peers,
        method=Method(plain_finalists=1, overlap_finalists=1),
        clocks=lambda: {"sm_mhz": 1980.0},
        rows=FakeRows,
        peer_limit_s=more.pop("peer_limit_s", 10.0),
    )
    made.use(object())
    return made


def measured(gpu: FakeGpu, peers: Sequence[FakePeer], m: int = 16, **more: Any) -> CaseResult:
    return bench(gpu, peers, **more).measure(Job(Case(WEIGHT, m)))


def line(result: CaseResult, label: str) -> Line:
    return next(found for found in result.lines if found.label == label)


def test_the_best_of_each_kind_and_what_auto_takes_are_timed_and_the_rest_is_noted() -> None:
    result = measured(FakeGpu(US), [FakePeer("cublas")])
    labels = {found.label for found in result.lines}
    assert labels == {
        *("decode:a", "decode:a + overlap", "gemv", "gemm:x", "gemm:y", "cublas"),
    }
    assert set(result.quick) == {"decode:b", "decode:b + overlap", "gemm:z"}
    assert result.auto == "gemm:y"
    assert line(result, "decode:a + overlap").burst == Times((4.0,) * 7)
    assert line(result, "cublas").error == pytest.approx(3e-4)


def test_all_contenders_run_in_every_round_and_sustained_follows_a_long_run() -> None:
    gpu = FakeGpu(US)
    result = measured(gpu, [FakePeer("cublas")], m=16)
    burst, sustained = gpu.rounds_of[-2:]
    assert burst[0] == sustained[0]
    assert set(burst[0]) == {found.label for found in result.lines}
    assert gpu.did[-4:] == ["rounds", "rounds after pauses", "busy", "rounds"]
    assert all(found.sustained for found in result.lines)
    assert set(result.conditions) == {"before", "burst", "sustained"}


def test_below_16_rows_there_is_no_sustained_time() -> None:
    gpu = FakeGpu(US)
    result = measured(gpu, [], m=8)
    assert "busy" not in gpu.did
    assert not any(found.sustained for found in result.lines)
    quick = bench(gpu, []).measure(Job(Case(WEIGHT, 64), peers=False, sustained=False))
    assert not any(found.sustained for found in quick.lines)


@pytest.mark.parametrize("bad", ["wrong", "nan"])
def test_a_wrong_result_is_a_line_that_says_so_and_is_not_timed(bad: str) -> None:
    gpu = FakeGpu(US)
    peer = FakePeer("cublas", run=replace(run_of("cublas"), launch=lambda i: bad))
    found = line(measured(gpu, [peer]), "cublas")
    assert found.status == "wrong"
    assert "against float64" in found.note
    assert found.burst is None
    assert bad not in gpu.rounds_of[-1][0]


def test_a_peer_that_cannot_be_captured_is_timed_without_a_graph_and_says_so() -> None:
    peer = FakePeer("cublas", run=replace(run_of("cublas"), launch=lambda i: "uncapturable"))
    found = line(measured(FakeGpu(US), [peer]), "cublas")
    assert found.status == "ok"
    assert found.method == "calls one by one"
    assert "cannot be captured" in found.note


def test_a_peer_that_fails_is_a_line_and_the_others_run() -> None:
    def explode(i: int) -> None:
        raise RuntimeError("no kernel\nimage")

    peers = [
        FakePeer("missing", fails=Missing("takes groups of 64")),
        FakePeer("broken", fails=ValueError("bad shape")),
        FakePeer("bang", run=replace(run_of("bang"), launch=explode)),
        FakePeer("cublas"),
    ]
    result = measured(FakeGpu(US), peers)
    assert (line(result, "missing").status, line(result, "missing").note) == (
        "left out",
        "takes groups of 64",
    )
    assert "ValueError: bad shape" in line(result, "broken").note
    assert line(result, "bang").note == "RuntimeError: no kernel image"
    assert line(result, "cublas").status == "ok"


def test_a_weight_is_prepared_once_for_all_its_rows() -> None:
    peer = FakePeer("cublas")
    made = bench(FakeGpu(US), [peer])
    for m in (1, 8, 16):
        made.measure(Job(Case(WEIGHT, m)))
    assert peer.prepared == 1
    made.use(object())
    made.measure(Job(Case(WEIGHT, 1)))
    assert peer.prepared == 2


def test_who_is_far_behind_is_left_out_at_more_rows_with_the_reason() -> None:
    made = bench(FakeGpu(US), [FakePeer("slow")])
    assert line(made.measure(Job(Case(WEIGHT, 8))), "slow").status == "ok"
    assert line(made.measure(Job(Case(WEIGHT, 16))), "slow").status == "ok"
    later = made.measure(Job(Case(WEIGHT, 32)))
    assert line(later, "slow").status == "left out"
    assert line(later, "slow").note == "took 10.0 times the fastest at M = 16"
    assert "gemm:z" not in later.quick


def test_a_peer_that_spends_its_time_on_preparing_is_left_out() -> None:
    made = bench(FakeGpu(US), [FakePeer("cublas")], peer_limit_s=-1.0)
    found = line(made.measure(Job(Case(WEIGHT, 1))), "cublas")
    assert found.status == "left out"
    assert "preparing took" in found.note


def test_a_lost_gpu_ends_the_run() -> None:
    gpu = FakeGpu(US)

    def lose(i: int) -> None:
        gpu.lost = True
        raise RuntimeError("illegal address")

    peer = FakePeer("cublas", run=replace(run_of("cublas"), launch=lose))
    with pytest.raises(Lost, match="cublas"):
        measured(gpu, [peer])


def test_a_tactic_that_fails_in_the_short_pass_has_a_line_too() -> None:
    def explode(i: int) -> None:
        raise RuntimeError("too much shared memory")

    broken = replace(run_of("decode:c", "ours", kind="decode"), launch=explode)
    library = FakeLibrary([*TACTICS, broken], "gemv")
    found = line(measured(FakeGpu(US), [], library=library), "decode:c")
    assert (found.status, found.note) == ("failed", "RuntimeError: too much shared memory")


def test_every_graph_is_closed() -> None:
    gpu = FakeGpu(US)
    measured(gpu, [FakePeer("cublas"), FakePeer("bad", run=run_of("wrong"))])
    assert gpu.replays
    assert all(replay.closed for replay in gpu.replays)


def test_samples_are_of_small_graphs_of_every_contender() -> None:
    gpu = FakeGpu(US)
    peers = [FakePeer("cublas"), FakePeer("missing", fails=Missing("not here"))]
    found, auto, lines = bench(gpu, peers).samples(Case(WEIGHT, 1), 4, 25)
    assert auto == "gemm:y"
    assert found["decode:a + overlap"] == Times((4.0,) * 25)
    assert found["cublas"].median == 13.0
    absent = [line for line in lines if line.status != "ok"]
    assert [(line.label, line.status, line.note) for line in absent] == [
        ("missing", "left out", "not here")
    ]
    assert not any(line.broken for line in lines)
    assert all(replay.closed for replay in gpu.replays)


def test_finalists_come_with_their_counterparts_and_everything_means_everything() -> None:
    chosen = finalists(
        RANKED, "gemm:y", Method(plain_finalists=1, overlap_finalists=2, near=2.0), everything=False
    )
    assert {run.label for run in chosen} == set(US) - {"gemm:z", "cublas", "slow"}
    everything = finalists(RANKED, "", Method(plain_finalists=1), everything=True)
    assert everything == [run for run, _ in RANKED]


def test_who_was_not_near_in_the_short_pass_is_no_finalist() -> None:
    def chosen(near: float) -> set[str]:
        found = finalists(RANKED, "gemm:x", Method(near=near), everything=False)
        return {run.contender for run in found}

    # By rough times, of plain ones: a 5, b 6, gemv 7; of overlapped ones: a 4, b 5.5.
    assert chosen(1.3) == {"decode:a", "decode:b", "gemv", "gemm:x"}
    assert chosen(1.1) == {"decode:a", "gemv", "gemm:x"}, "the best of each kind stays"


def test_jobs_of_a_weight_come_together_in_the_order_of_the_first() -> None:
    other = Weight(8192, 8192, 128)
    jobs = [Job(Case(WEIGHT, 1)), Job(Case(other, 1)), Job(Case(WEIGHT, 2))]
    groups = list(by_weight(jobs))
    assert [weight for weight, _ in groups] == [WEIGHT, other]
    assert [job.case.m for job in groups[0][1]] == [1, 2]


# ---- Which tactics are tried ----


def test_tactics_that_are_made_for_far_fewer_rows_are_not_tried() -> None:
    decode = SimpleNamespace(kind="decode", tile=(64, 8, 256))
    gemm = SimpleNamespace(kind="gemm", tile=(128, 16, 64))
    assert [m for m in (1, 8, 32, 33, 64) if hopeless(decode, m)] == [33, 64]
    assert [m for m in (16, 128, 256, 4096) if hopeless(gemm, m)] == [256, 4096]


def test_the_largest_tiles_are_tried_with_any_number_of_rows() -> None:
    tactics = [
        SimpleNamespace(kind="gemm", tile=(128, 256, 64)),
        SimpleNamespace(kind="gemm", tile=(128, 128, 64)),
        SimpleNamespace(kind="decode", tile=(192, 128, 128)),
    ]
    # Or all others would be tried as well, because no tactic is left.
    assert not any(hopeless(tactic, m) for tactic in tactics for m in (1, 1024, 4096, 1 << 20))
    assert hopeless(SimpleNamespace(kind="gemm", tile=(128, 64, 64)), 1024)


# ---- Clocks ----


class FakeNvml:
    """As much of NVML as is asked."""

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: Any, handle: Any) -> int:  # noqa: N802
        return 0 if uuid.value == b"GPU-1" else 2

    def nvmlDeviceGetHandleByIndex_v2(self, index: Any, handle: Any) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetClockInfo(self, handle: Any, which: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = 1000 * which.value
        return 0

    def nvmlDeviceGetPowerUsage(self, handle: Any, value: Any) -> int:  # noqa: N802
        value._obj.value = 612_300
        return 0

    def nvmlSystemGetDriverVersion(self, text: Any, size: Any) -> int:  # noqa: N802
        ctypes.memmove(text, b"580.1\0", 6)
        return 0


def test_clocks_and_power_are_noted_as_far_as_they_are_known() -> None:
    clocks = Clocks("1", FakeNvml())
    assert clocks.now() == {"sm_mhz": 1000.0, "memory_mhz": 2000.0, "power_w": 612.3}
    assert clocks.driver() == "580.1"


def test_without_nvml_there_is_a_note_and_no_clock() -> None:
    clocks = Clocks("", SimpleNamespace(nvmlInit_v2=lambda: 9))
    assert clocks.problem == "clocks are not noted: NVML error 9"
    assert clocks.now() == {}
    assert clocks.driver() == ""
