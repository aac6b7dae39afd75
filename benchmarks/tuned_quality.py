"""How near to the best tactic ``w4a16.tune`` comes, by times that it has not seen.

python -m benchmarks.tuned_quality [--limit SECONDS] [--shapes N] [--out FILE.json]

needs a GPU and W4A16_LIBRARY (or an installed package), neither torch nor a network. It tunes the
anchor shapes into a cache of its own, which is gone afterwards, then times every tactic that can
run on them once more: at buckets of M, and between them. A short pass covers all tactics, a long
one those near the best and the one that was chosen. It prints how many times slower than the best
the chosen one is, as geometric mean and worst, for what was tuned and, on the same times, for the
library's own rule. Cases come in the order of their importance; at the limit it stops with what it
has.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from w4a16 import tactics
from w4a16.cache import ENVIRONMENT
from w4a16.errors import W4A16Error
from w4a16.library import LIBRARY, Problem, QuantOp
from w4a16.tables import BUCKETS, Case
from w4a16.timing import Timer, current_device
from w4a16.tune import Times, tune

from benchmarks.shipped_table import ANCHORS, state
from benchmarks.table_quality import Choose, Row, report, worst

WITH_ZEROS = ((4096, 4096), (28672, 4096), (10240, 8192))
AT_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BETWEEN = (9, 20, 40, 100, 150, 400, 700, 1100, 3500)
_LARGEST_M = max(AT_BUCKETS)

#: What is this much slower than the best in the short pass is not timed again.
_NEAR = 1.25
_FOR_TUNING = 0.6


@dataclass(frozen=True)
class Timed:
    """A row, and what was chosen for it."""

    row: Row
    chosen: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=float, default=180.0, help="seconds in all")
    parser.add_argument("--shapes", type=int, default=None, help="only the first so many (N, K)")
    parser.add_argument("--out", type=Path, default=None, help="a file for all times, as JSON")
    given = parser.parse_args(arguments)
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    begin = time.monotonic()
    try:
        device = current_device()
        LIBRARY.check_device(device)
    except W4A16Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{LIBRARY.device(device).name}, {state()}", flush=True)
    with (
        tempfile.TemporaryDirectory(prefix="w4a16-") as folder,
        mock.patch.dict(os.environ, {ENVIRONMENT: folder}),
    ):
        tactics.forget()
        tuned = tune(cases(given.shapes), device=device, budget=given.limit * _FOR_TUNING)
        print(f"tuned {len(tuned.rows)} buckets in {tuned.seconds:.0f} s: {tuned.note}")
        for text in (*tuned.skipped, *(f"{name}: {why}" for name, why in tuned.broken.items())):
            print(f"left out: {text}")
        entries = tuned.entries()  # at the limit the last case has not all of its buckets
        known = [c for c in cases(given.shapes) if max(entries.get(c, {}), default=0) >= _LARGEST_M]
        with Timer(device) as timer:
            timed = list(again(timer, known, device, begin + given.limit, set(tuned.broken)))
    tactics.forget()
    print(f"timed {len(timed)} again, {time.monotonic() - begin:.0f} s in all\n")
    if given.out is not None:
        given.out.write_text(json.dumps([as_json(one) for one in timed], indent=1) + "\n")
    if not timed:
        print("nothing was timed again: raise --limit, or lower --shapes")
        return 1
    chosen = {(one.row.case, one.row.m): one.chosen for one in timed}

    def choose(row: Row) -> str:
        return chosen[row.case, row.m]

    rows = [one.row for one in timed]
    show("tuned", rows, choose)
    show("library's rule", rows, lambda row: row.auto)
    worst(rows, choose)
    return 0


def cases(shapes: int | None = None) -> list[Case]:
    """The most important first."""
    anchors = ANCHORS[:shapes]
    return [
        *(Case(QuantOp.GROUP_SCALE, 128, *shape) for shape in anchors),
        *(Case(QuantOp.GROUP_SCALE_ZERO, 128, *shape) for shape in WITH_ZEROS if shape in anchors),
    ]


def again(
    timer: Times, known: Sequence[Case], device: int, deadline: float, broken: set[str]
) -> Iterator[Timed]:
    """Each case at each M, until the deadline."""
    for case in known:
        timer.prepare(case)
        for m in sorted((*AT_BUCKETS, *BETWEEN)):
            if time.monotonic() > deadline:
                print(f"{case}: M = {m} and all after it: out of time")
                return
            if timer.why_not(m):
                continue
            problem = Problem(
                quant_op=case.quant_op, m=m, n=case.n, k=case.k, group_size=case.group_size
            )
            running = [
                tactic.index
                for tactic in LIBRARY.tactics
                if tactic.name not in broken
                and tactics.accurate(tactic, problem)
                and not LIBRARY.why_unsupported(tactic.index, problem)
            ]
            chosen = tactics.choose(device, problem).tactic
            auto = LIBRARY.auto_tactic(problem)
            short = timer.time(running, m, quick=True)
            near = _NEAR * min(short.values())
            also = {index for index in (chosen, auto) if index in short}
            finalists = sorted(also | {index for index, us in short.items() if us <= near})
            us = {**short, **timer.time(finalists, m, quick=False)}
            # The others were slower than these, whatever a short pass made of them.
            least = min(us[index] for index in finalists)
            times = {
                LIBRARY.tactics[index].name: value if index in finalists else max(value, least)
                for index, value in us.items()
            }
            row = Row(case=case, m=m, us=times, auto=LIBRARY.tactics[auto].name)
            yield Timed(row, LIBRARY.tactics[chosen].name)


def show(name: str, rows: Sequence[Row], choose: Choose) -> None:
    report(name, rows, choose)
    for label, part in (
        ("at buckets", [row for row in rows if row.m in BUCKETS]),
        ("between buckets", [row for row in rows if row.m not in BUCKETS]),
        ("with zeros", [row for row in rows if row.case.quant_op is QuantOp.GROUP_SCALE_ZERO]),
    ):
        if part:
            report(f"{name}, {label}", part, choose)


def as_json(one: Timed) -> dict[str, object]:
    case = one.row.case
    return {
        "quant_op": case.quant_op.name.lower(),
        "group_size": case.group_size,
        "n": case.n,
        "k": case.k,
        "m": one.row.m,
        "us": dict(one.row.us),
        "auto": one.row.auto,
        "chosen": one.chosen,
    }


if __name__ == "__main__":
    sys.exit(main())
