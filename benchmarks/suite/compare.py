"""Two results side by side: ratios of times with their noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.suite import tables
from benchmarks.suite.cases import Case
from benchmarks.suite.results import MODES, CaseResult, Mode, Result, Times
from benchmarks.suite.tables import Pick

#: Two runs of the same library differ by up to so much, whatever the spread within each says.
LEAST_NOISE = 0.02


@dataclass(frozen=True, kw_only=True)
class Change:
    """One contender on one case, then and now."""

    case: Case
    mode: Mode
    who: str
    old_us: float
    new_us: float
    noise: float
    """Relative: what both spreads make together, and at least :data:`LEAST_NOISE`."""

    @property
    def ratio(self) -> float:
        """New over old: below 1 is faster."""
        return self.new_us / self.old_us

    @property
    def beyond(self) -> bool:
        return abs(math.log(self.ratio)) > math.log1p(self.noise)

    @property
    def verdict(self) -> str:
        if not self.beyond:
            return "within noise"
        return "faster" if self.ratio < 1 else "slower"


def noise(old: Times, new: Times) -> float:
    return max(LEAST_NOISE, math.hypot(old.spread, new.spread))


def changes(old: Result, new: Result) -> list[Change]:
    """Of every contender on every case that both have."""
    before = {case.case: case for case in old.cases}
    names = [name for name in tables.peers_of(new) if name in tables.peers_of(old)]
    picks: list[tuple[str, Pick]] = [
        ("best", tables.ours),
        ("best, plain", tables.ours_plain),
        ("auto", tables.auto),
        ("upstream", tables.upstream),
        *((name, tables.peer(name)) for name in names),
    ]
    found: list[Change] = []
    for case in new.cases:
        if case.case in before:
            for who, pick in picks:
                for mode in MODES:
                    found += _change(before[case.case], case, mode, who, pick)
    return found


def _change(old: CaseResult, new: CaseResult, mode: Mode, who: str, pick: Pick) -> Iterator[Change]:
    lines = pick(old, mode), pick(new, mode)
    then, now = (line.times(mode) if line else None for line in lines)
    if then is not None and now is not None:
        yield Change(
            case=new.case,
            mode=mode,
            who=who,
            old_us=then.median,
            new_us=now.median,
            noise=noise(then, now),
        )


def text(old: Result, new: Result) -> str:
    """A summary, and what differs beyond its noise."""
    found = changes(old, new)
    lines = [
        "",
        f"compared with {old.made.get('date', 'an earlier run')}: new over old, < 1 is faster",
    ]
    for name in ("device", "driver", "torch"):
        then, now = old.environment.get(name), new.environment.get(name)
        if then != now:
            lines.append(f"MIND: {name} was {then}, is {now}")
    if old.settings != new.settings:
        changed = sorted(
            key
            for key in {*old.settings, *new.settings}
            if old.settings.get(key) != new.settings.get(key)
        )
        lines.append(f"MIND: measured in another way: {', '.join(changed)}")
    if not found:
        return "\n".join([*lines, "the two have no case in common"])
    lines.append(_drift(old, new))
    whos = dict.fromkeys(change.who for change in found)
    for mode in MODES:
        for who in whos:
            mine = [change for change in found if (change.who, change.mode) == (who, mode)]
            if mine:
                mean = tables.mean(change.ratio for change in mine).value
                counts = [
                    f"{sum(c.verdict == verdict for c in mine)} {verdict}"
                    for verdict in ("faster", "within noise", "slower")
                ]
                lines.append(f"{who}, {mode}: {mean:.3f} over {len(mine)} ({', '.join(counts)})")
    beyond = [change for change in found if change.beyond]
    if beyond:
        lines += ["", "| case | who | mode | old us | new us | ratio | noise | |"]
        lines.append("|" + " --- |" * 8)
        for change in sorted(beyond, key=lambda c: (-abs(math.log(c.ratio)), c.case.name)):
            lines.append(
                f"| {change.case} | {change.who} | {change.mode} | {change.old_us:.2f} |"
                f" {change.new_us:.2f} | {change.ratio:.3f} | ± {100 * change.noise:.1f} % |"
                f" {change.verdict} |"
            )
    else:
        lines.append("nothing differs beyond its noise")
    return "\n".join(lines)


def _drift(old: Result, new: Result) -> str:
    """How much the machine itself differs: the same reading and multiplying, then and now."""
    parts = []
    ratios = [
        read.times.median / before.times.median
        for read in new.reads
        if (before := old.read(read.weight)) is not None
    ]
    if ratios:
        parts.append(f"reading {tables.mean(ratios).value:.3f}")
    for mode in MODES:
        then, now = old.tflops(mode), new.tflops(mode)
        if then and now:
            parts.append(f"FP16 matmul {mode} {then / now:.3f}")
    return f"the machine itself: {', '.join(parts) or 'not measured in both'}"
