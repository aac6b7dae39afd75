"""What reports and plots show, as numbers: who was fastest, and how that compares."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TypeAlias

from benchmarks.suite.cases import Case, Weight
from benchmarks.suite.results import CaseResult, Line, Mode, Result
from benchmarks.suite.stats import geometric_mean

Pick: TypeAlias = Callable[[CaseResult, Mode], "Line | None"]


def fastest(case: CaseResult, mode: Mode, wanted: Callable[[Line], bool]) -> Line | None:
    """The line with the least median of those that are wanted, right and timed."""
    timed = [
        (times.median, line)
        for line in case.lines
        if line.status == "ok" and wanted(line) and (times := line.times(mode)) is not None
    ]
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def ours(case: CaseResult, mode: Mode) -> Line | None:
    """The best tactic of this library, with dependent launch if that is faster."""
    return fastest(case, mode, lambda line: line.role != "peer")


def ours_plain(case: CaseResult, mode: Mode) -> Line | None:
    return fastest(case, mode, lambda line: line.role != "peer" and not line.overlap)


def auto(case: CaseResult, mode: Mode) -> Line | None:
    """What the package takes, with dependent launch where the tactic has it."""
    mine = [line for line in case.lines if line.contender == case.auto and line.role != "peer"]
    best = max(mine, key=lambda line: line.overlap, default=None)
    return fastest(case, mode, lambda line: line is best)


def auto_plain(case: CaseResult, mode: Mode) -> Line | None:
    return fastest(
        case,
        mode,
        lambda line: line.contender == case.auto and line.role != "peer" and not line.overlap,
    )


def upstream(case: CaseResult, mode: Mode) -> Line | None:
    """The best of what was extracted from TensorRT-LLM."""
    return fastest(case, mode, lambda line: line.role == "upstream")


def best_peer(case: CaseResult, mode: Mode) -> Line | None:
    return fastest(case, mode, lambda line: line.role == "peer")


def peer(name: str) -> Pick:
    def pick(case: CaseResult, mode: Mode) -> Line | None:
        return fastest(case, mode, lambda line: line.role == "peer" and line.contender == name)

    return pick


def peers_of(result: Result) -> list[str]:
    """Peers that were timed anywhere."""
    return list(
        dict.fromkeys(
            line.contender
            for case in result.cases
            for line in case.lines
            if line.role == "peer" and line.burst
        )
    )


def microseconds(case: CaseResult, mode: Mode, pick: Pick) -> float:
    """NaN if nobody is there."""
    line = pick(case, mode)
    times = line.times(mode) if line else None
    return times.median if times else math.nan


@dataclass(frozen=True)
class Mean:
    """A geometric mean over shapes."""

    value: float
    count: int


def mean(values: Iterable[float]) -> Mean:
    """Of those that are there."""
    there = [value for value in values if not math.isnan(value)]
    return Mean(geometric_mean(there), len(there))


def of_floor(result: Result, case: CaseResult, mode: Mode, pick: Pick) -> float:
    """Floor over time: 1 is the limit."""
    floor = result.floor(case.case, mode)
    return math.nan if floor is None else floor / microseconds(case, mode, pick)


def against(case: CaseResult, mode: Mode, pick: Pick, other: Pick) -> float:
    """How many times faster ``pick`` is than ``other``."""
    return microseconds(case, mode, other) / microseconds(case, mode, pick)


def quantisations(result: Result) -> list[tuple[int, bool]]:
    """(group, zeros) in the order of the run."""
    return list(dict.fromkeys((c.case.weight.group, c.case.weight.zeros) for c in result.cases))


def with_rows(result: Result, group: int, zeros: bool) -> dict[int, list[CaseResult]]:
    """The cases of a quantisation by ascending M."""
    found: dict[int, list[CaseResult]] = {}
    for case in result.cases:
        if (case.case.weight.group, case.case.weight.zeros) == (group, zeros):
            found.setdefault(case.case.m, []).append(case)
    return dict(sorted(found.items()))


def by_weight(result: Result) -> dict[Weight, list[CaseResult]]:
    found: dict[Weight, list[CaseResult]] = {}
    for case in result.cases:
        found.setdefault(case.case.weight, []).append(case)
    return {w: sorted(cs, key=lambda case: case.case.m) for w, cs in found.items()}


def costs(
    result: Result, mode: Mode, pick: Pick, group: int, zeros: bool
) -> dict[int, dict[str, float]]:
    """By M and shape: how many times the time of group 128 without zeros another quantisation
    takes."""
    by_case = {case.case: case for case in result.cases}
    found: dict[int, dict[str, float]] = {}
    for m, cases in with_rows(result, group, zeros).items():
        for case in cases:
            weight = case.case.weight
            base = by_case.get(Case(Weight(weight.n, weight.k, 128), m))
            if base is None:
                continue
            ratio = microseconds(case, mode, pick) / microseconds(base, mode, pick)
            if not math.isnan(ratio):
                found.setdefault(m, {})[f"{weight.n}x{weight.k}"] = ratio
    return found
