"""What a run found, as frozen dataclasses, and its JSON: versioned, and refused if it is another's.

Times are microseconds of one launch. Every sample is kept; medians and spreads follow from them.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.suite.cases import Case, Weight, parse
from benchmarks.suite.errors import ResultError, UsageError
from benchmarks.suite.stats import iqr

FORMAT = "w4a16-bench"
VERSION = 1

Role = Literal["ours", "upstream", "peer"]
"""``ours``: tactics that this project wrote; ``upstream``: those extracted from TensorRT-LLM;
``peer``: everybody else."""
Status = Literal["ok", "wrong", "failed", "left out"]
Mode = Literal["burst", "sustained"]
MODES: tuple[Mode, ...] = ("burst", "sustained")
ROLES: tuple[Role, ...] = ("ours", "upstream", "peer")
STATUSES: tuple[Status, ...] = ("ok", "wrong", "failed", "left out")


@dataclass(frozen=True)
class Times:
    """Microseconds of a launch in each replay, in the order in which they were measured."""

    us: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.us)

    @property
    def least(self) -> float:
        return min(self.us)

    @property
    def most(self) -> float:
        return max(self.us)

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        return iqr(self.us) / self.median


@dataclass(frozen=True, kw_only=True)
class Line:
    """One contender on one case."""

    contender: str
    """``decode:64x8``, ``sm90:128x16x64:1x1x1``, ``gemv``, ``cublas``, …"""
    role: Role
    overlap: bool = False
    """With programmatic dependent launch."""
    status: Status = "ok"
    note: str = ""
    """Why there is no time, or what is special about it."""
    method: str = "graph"
    launches: int = 0
    """In a graph."""
    error: float | None = None
    """Relative Frobenius error against float64 on sampled rows and columns."""
    burst: Times | None = None
    sustained: Times | None = None

    @property
    def label(self) -> str:
        return self.contender + (" + overlap" if self.overlap else "")

    @property
    def broken(self) -> bool:
        """Whether it is a tactic of this library, and was wrong or failed."""
        return self.role != "peer" and self.status in ("wrong", "failed")

    def times(self, mode: Mode) -> Times | None:
        return self.burst if mode == "burst" else self.sustained


@dataclass(frozen=True, kw_only=True)
class Read:
    """The kernel that only reads a weight, its scales and its zeros."""

    weight: Weight
    bytes: int
    setting: str
    times: Times


@dataclass(frozen=True, kw_only=True)
class CaseResult:
    """All contenders on one case."""

    case: Case
    lines: tuple[Line, ...]
    auto: str = ""
    """The tactic that the package takes."""
    auto_source: str = ""
    quick: Mapping[str, float] = field(default_factory=dict)
    """Microseconds of tactics that a short first pass found too slow to be timed properly."""
    conditions: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Clocks (MHz), power (W) and temperature (C) before, and at the end of each mode."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run."""

    suite: str
    made: Mapping[str, Any]
    """Date, command, seconds."""
    environment: Mapping[str, Any]
    settings: Mapping[str, Any]
    contenders: Mapping[str, str] = field(default_factory=dict)
    """Version of each contender, or why it did not take part."""
    rates: Mapping[str, Times] = field(default_factory=dict)
    """Microseconds of the large FP16 matmul by mode; ``settings`` has its size."""
    empty: Times | None = None
    """An empty kernel in a graph."""
    reads: tuple[Read, ...] = ()
    cases: tuple[CaseResult, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def tflops(self, mode: Mode) -> float | None:
        """The matmul's rate; sustained falls back on burst."""
        times = self.rates.get(mode) or self.rates.get("burst")
        size = self.settings.get("matmul")
        if times is None or not isinstance(size, list):
            return None
        m, n, k = size
        return float(2e-6 * m * n * k / times.median)

    def read(self, weight: Weight) -> Read | None:
        return next((read for read in self.reads if read.weight == weight), None)

    def floor(self, case: Case, mode: Mode) -> float | None:
        """Microseconds that no kernel can beat by much: see :func:`floor_us`."""
        read = self.read(case.weight)
        return floor_us(read.times.median if read else None, case.flops, self.tflops(mode))


def floor_us(read_us: float | None, flops: float, tflops: float | None) -> float | None:
    """The larger of reading the weight and multiplying at the matmul's rate; None if reading was
    not measured."""
    if read_us is None:
        return None
    return max(read_us, 1e-6 * flops / tflops if tflops else 0.0)


# ---- JSON ----


def dumps(result: Result) -> str:
    """The result as JSON, a line a case."""
    head: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "suite": result.suite,
        "made": dict(result.made),
        "environment": dict(result.environment),
        "settings": dict(result.settings),
        "contenders": dict(result.contenders),
        "rates": {mode: list(times.us) for mode, times in result.rates.items()},
        "empty": list(result.empty.us) if result.empty else None,
        "reads": [
            {**asdict(read), "weight": str(read.weight), "times": list(read.times.us)}
            for read in result.reads
        ],
        "left_out": list(result.left_out),
        "notes": list(result.notes),
    }
    rows = ",\n".join(json.dumps(_case(case), allow_nan=False) for case in result.cases)
    text = json.dumps(head, indent=1, allow_nan=False)
    return f'{text[: text.rindex("}")].rstrip()},\n "cases": [\n{rows}\n]}}\n'


def _case(case: CaseResult) -> dict[str, Any]:
    return {
        "case": case.case.name,
        "auto": case.auto,
        "auto_source": case.auto_source,
        "quick": {name: round(us, 3) for name, us in case.quick.items()},
        "conditions": {when: dict(found) for when, found in case.conditions.items()},
        "lines": [_line(line) for line in case.lines],
    }


def _line(line: Line) -> dict[str, Any]:
    value = asdict(line)
    for mode in MODES:
        times = line.times(mode)
        value[mode] = None if times is None else [round(us, 4) for us in times.us]
    if value["error"] is not None and not math.isfinite(value["error"]):
        value["error"] = None
    return value


def loads(text: str, where: str = "the result") -> Result:
    """The result in a file's text; raises :class:`ResultError`."""
    try:
        content = json.loads(text)
    except ValueError as error:
        raise ResultError(f"{where} is no JSON: {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ResultError(f'{where} has no "format": "{FORMAT}": expected what a run wrote')
    if content.get("version") != VERSION:
        raise ResultError(
            f"{where} has version {content.get('version')!r}, this program reads {VERSION}:"
            " take the program that wrote it, or run again"
        )
    try:
        return _result(content)
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise ResultError(f"{where} is damaged: {type(error).__name__}: {error}") from None


def load(path: Path) -> Result:
    """The result in a file; raises :class:`ResultError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from None
    return loads(text, str(path))


def _result(content: Mapping[str, Any]) -> Result:
    return Result(
        suite=str(content["suite"]),
        made=dict(content["made"]),
        environment=dict(content["environment"]),
        settings=dict(content["settings"]),
        contenders={str(k): str(v) for k, v in content["contenders"].items()},
        rates={str(mode): _some(us) for mode, us in content["rates"].items()},
        empty=_times(content["empty"]),
        reads=tuple(
            Read(
                weight=_weight(read["weight"]),
                bytes=int(read["bytes"]),
                setting=str(read["setting"]),
                times=_some(read["times"]),
            )
            for read in content["reads"]
        ),
        cases=tuple(_case_result(case) for case in content["cases"]),
        left_out=tuple(map(str, content["left_out"])),
        notes=tuple(map(str, content["notes"])),
    )


def _case_result(content: Mapping[str, Any]) -> CaseResult:
    return CaseResult(
        case=parse(content["case"]),
        lines=tuple(_line_of(line) for line in content["lines"]),
        auto=str(content["auto"]),
        auto_source=str(content["auto_source"]),
        quick={str(name): float(us) for name, us in content["quick"].items()},
        conditions={
            str(when): {str(k): float(v) for k, v in found.items()}
            for when, found in content["conditions"].items()
        },
    )


def _line_of(content: Mapping[str, Any]) -> Line:
    if content["role"] not in ROLES or content["status"] not in STATUSES:
        raise ValueError(f"role {content['role']!r}, status {content['status']!r}")
    return Line(
        contender=str(content["contender"]),
        role=cast(Role, content["role"]),
        overlap=bool(content["overlap"]),
        status=cast(Status, content["status"]),
        note=str(content["note"]),
        method=str(content["method"]),
        launches=int(content["launches"]),
        error=None if content["error"] is None else float(content["error"]),
        burst=_times(content["burst"]),
        sustained=_times(content["sustained"]),
    )


def _times(us: Any) -> Times | None:
    return None if us is None else _some(us)


def _some(us: Any) -> Times:
    times = Times(tuple(float(value) for value in us))
    if not times.us or not all(0 < value < math.inf for value in times.us):
        raise ValueError("times must be above 0")
    return times


def _weight(name: str) -> Weight:
    return parse(f"{name}:m1").weight
