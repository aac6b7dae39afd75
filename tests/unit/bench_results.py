"""Results that nobody measured, for tests of what is made of results."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.suite.cases import SUSTAINED_FROM, Case, Weight
from benchmarks.suite.results import CaseResult, Line, Read, Result, Times

SHAPES = ((4096, 4096), (8192, 28672))
ROWS = (1, 8, 16, 64)
SETTINGS = {
    "replays": 9,
    "replays_many_rows": 7,
    "many_rows": 512,
    "launches": 40,
    "launches_many_rows": 10,
    "warm": 2,
    "pause_s": 0.05,
    "sustain_s": 0.35,
    "sustained_from": 16,
    "rotation_bytes": 400 << 20,
    "limit": 3e-3,
    "limit_bf16": 1e-2,
    "matmul": [8192, 8192, 8192],
}


def times(us: float, spread: float = 0.01) -> Times:
    """Nine samples with this median, and about this interquartile range over median."""
    return Times(tuple(us * (1 + spread * step / 4) for step in range(-4, 5)))


def line(contender: str, role: str, us: float, m: int, **more: object) -> Line:
    sustained = times(us * 1.1) if m >= SUSTAINED_FROM else None
    made = Line(contender=contender, role="ours", burst=times(us), sustained=sustained, launches=40)
    return replace(made, **{"role": role, "error": 3e-4, **more})  # type: ignore[arg-type]


def case(n: int, k: int, m: int, group: int = 128, zeros: bool = False) -> CaseResult:
    """Decode takes 10 us (overlapped 8), upstream 20, the peers 16 and 32, whatever the shape."""
    cost = 1.04 if zeros else 1.0
    return CaseResult(
        case=Case(Weight(n, k, group, zeros), m),
        auto="decode:64x8",
        auto_source="measured",
        quick={"sm90:64x16x64:1x1x1": 50.0},
        conditions={"burst": {"sm_mhz": 1980.0, "power_w": 610.0}},
        lines=(
            line("decode:64x8", "ours", 8 * cost, m, overlap=True),
            line("decode:64x8", "ours", 10 * cost, m),
            line("gemv", "upstream", 20 * cost, m),
            line("cublas", "peer", 32, m),
            line("humming", "peer", 16, m),
            Line(contender="gemlite", role="peer", status="failed", note="no | luck", method=""),
        ),
    )


def result() -> Result:
    """Two shapes at four M, with zeros as well."""
    weights = [Weight(n, k, 128, zeros) for zeros in (False, True) for n, k in SHAPES]
    return Result(
        suite="linear",
        made={"date": "2025-01-01T00:00:00+00:00", "command": "bench", "seconds": 3.0},
        environment={"device": "NVIDIA Test", "sm_count": 132, "driver": "1.2", "library": {}},
        settings=dict(SETTINGS),
        contenders={"library": "1", "gemlite": "2", "tensorrt_llm": "missing: not installed"},
        rates={"burst": times(1391.0), "sustained": times(1600.0)},
        empty=times(0.8),
        reads=tuple(
            Read(weight=w, bytes=w.bytes, setting="528 blocks", times=times(6.0)) for w in weights
        ),
        cases=tuple(case(w.n, w.k, m, w.group, w.zeros) for w in weights for m in ROWS),
        left_out=("57344x8192:g128:m1: out of time",),
        notes=("a note",),
    )
