"""Measures the table of tactics that ships for a GPU, on that GPU.

python -m benchmarks.shipped_table --out DIR [--limit SECONDS] [--shapes N] [--keep-above M]

needs a GPU and W4A16_LIBRARY (or an installed package), neither torch nor a network. Writes

* ``DIR/tactics-GPU.json``: the table, to be put into ``runtime/w4a16/data/``;
* ``DIR/tactics-GPU.raw.json``: the times of all tactics, for ``benchmarks.table_quality``; under
  ``verify`` some cases timed a second time, and numbers of rows between the buckets.

Cases come in the order of their importance; at the limit it stops with what it has.
``--keep-above M`` measures up to M rows of activations only, and takes larger numbers of rows from
the table that ships already: for new tactics that are for few rows. Cases that were not measured
stay as they are there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from w4a16 import tables, tactics
from w4a16.library import LIBRARY, QuantOp, Tactic
from w4a16.tables import BUCKETS, Case, Entries
from w4a16.timing import Timer, conditions, current_device
from w4a16.tune import Measured, Times, entries_of, made_now, measure, row_as_json

#: (N, K) of ``docs/benchmarks``, and of layers of common models.
ANCHORS = (
    *((4096, 4096), (28672, 4096), (10240, 8192), (8192, 28672)),
    *((6144, 4096), (4096, 14336), (57344, 8192)),
)
MODELS = (
    *((8192, 8192), (5120, 5120), (12288, 4096), (3584, 3584), (2560, 9728)),
    *((11008, 4096), (4096, 11008), (13824, 5120), (5120, 13824), (1024, 4096)),
    *((18944, 3584), (3584, 18944), (14336, 4096), (22016, 4096), (28672, 8192)),
    *((4608, 3584), (37888, 3584), (19456, 2560), (7168, 5120), (27648, 5120)),
    *((5120, 27648), (1024, 8192), (2048, 2048), (2560, 2560), (2048, 8192)),
)
OTHER_GROUPS = ((4096, 4096), (10240, 8192), (4096, 14336))

VERIFIED = ANCHORS[:4]
VERIFY_M = (1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096)
BETWEEN_M = (9, 14, 20, 40, 80, 100, 150, 300, 400, 600, 700, 1000, 1100, 1700, 3500)

#: A case is left out of the table if what would stand in for it is no slower than this.
AGREEING = 1.015
_FOR_VERIFICATION = 0.12


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the two files")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds in all")
    parser.add_argument("--shapes", type=int, default=None, help="only the first so many (N, K)")
    parser.add_argument("--keep-above", type=int, default=None, metavar="M")
    given = parser.parse_args(arguments)
    most = BUCKETS[-1] if given.keep_above is None else given.keep_above
    if most not in BUCKETS:
        parser.error(f"--keep-above {most} is no bucket of M: expected one of {BUCKETS}")
    begin = time.monotonic()
    deadline = begin + given.limit
    device = current_device()
    gpu = LIBRARY.device(device)
    key = tactics.key_of(gpu)
    known, reason = tables.shipped(gpu.name, key.sm, gpu.sm_count)
    if given.keep_above is not None and known is None:
        parser.error(
            f"--keep-above {most}: no table has rows to keep ({reason}); leave the option out"
        )
    made: dict[str, Any] = {**made_now(), **conditions(device), "before": state()}
    print(f"{gpu.name}, {gpu.sm_count} SMs, {made}", flush=True)
    raw: dict[str, Any] = {
        **{"format": "w4a16-times", "version": 1, "made": made},
        "key": {name: getattr(key, name) for name in tables.Key.__dataclass_fields__},
    }
    given.out.mkdir(parents=True, exist_ok=True)
    place = given.out / f"tactics-{tables.slug(gpu.name)}.json"
    with Timer(device) as timer:
        cases = [(case, [m for m in buckets if m <= most]) for case, buckets in work(given.shapes)]
        rows = _measure(timer, cases, deadline - _FOR_VERIFICATION * given.limit)
        raw["rows"] = [row_as_json(row) for row in rows]
        made["after"] = state()
        _write(place.with_suffix(".raw.json"), json.dumps(raw) + "\n")
        full: Entries = entries_of(rows)
        if given.keep_above is not None and known is not None:
            full = with_kept(full, known.entries, most)
            made["kept"] = f"M > {most}, from an earlier run"
        table = tables.Table(key=key, entries=without_agreeing(full, gpu.sm_count), made=made)
        _write(place, tables.dumps(table))
        shapes = VERIFIED[: given.shapes]
        checks: list[tuple[Case, Sequence[int]]] = []
        checks += [(Case(QuantOp.GROUP_SCALE, 128, *shape), VERIFY_M) for shape in shapes]
        checks += [(Case(QuantOp.GROUP_SCALE_ZERO, 128, *shape), VERIFY_M) for shape in shapes]
        checks += [(Case(QuantOp.GROUP_SCALE, 128, *shape), BETWEEN_M) for shape in shapes]
        again = _measure(timer, checks, deadline)
    raw["verify"] = [row_as_json(row) for row in again]
    _write(place.with_suffix(".raw.json"), json.dumps(raw) + "\n")
    print(
        f"{len(rows)} + {len(again)} buckets in {time.monotonic() - begin:.0f} s; "
        f"{len(table.entries)} of {len(full)} cases in {place}, {place.stat().st_size:,} bytes"
    )
    return 0


def work(shapes: int | None = None) -> list[tuple[Case, Sequence[int]]]:
    """The cases, the most important first."""
    plain, zero, column = QuantOp.GROUP_SCALE, QuantOp.GROUP_SCALE_ZERO, QuantOp.PER_COLUMN
    anchors, models = ANCHORS[:shapes], MODELS if shapes is None else ()
    groups = tuple(shape for shape in OTHER_GROUPS if shape in anchors)
    cases = [
        *(Case(plain, 128, *shape) for shape in anchors),
        *(Case(zero, 128, *shape) for shape in anchors),
        *(Case(plain, 128, *shape) for shape in models[:10]),
        *(Case(zero, 64, *shape) for shape in groups[:2]),
        *(Case(plain, 64, *shape) for shape in groups[:1]),
        *(Case(column, 0, *shape) for shape in groups[:2]),
        *(Case(zero, 128, *shape) for shape in models[:10]),
        *(Case(plain, 128, *shape) for shape in models[10:]),
        *(Case(zero, 128, *shape) for shape in models[10:]),
        *(Case(plain, 64, *shape) for shape in groups[1:]),
        *(Case(zero, 64, *shape) for shape in groups[2:]),
        *(Case(column, 0, *shape) for shape in groups[2:]),
    ]
    return [(case, BUCKETS) for case in cases]


def _measure(
    timer: Times, cases: Sequence[tuple[Case, Sequence[int]]], deadline: float
) -> list[Measured]:
    """Timed rows, with a line for each case on the way."""
    broken: dict[str, str] = {}
    skipped: list[str] = []
    rows: list[Measured] = []
    begin = since = time.monotonic()
    current: Case | None = None
    for row in measure(timer, cases, broken=broken, skipped=skipped, deadline=deadline):
        if row.case != current:
            now = time.monotonic()
            if current is not None:
                print(f"{now - begin:6.1f} s  {now - since:5.1f} s  {current}", flush=True)
            current, since = row.case, now
        rows.append(row)
    if current is not None:
        now = time.monotonic()
        print(f"{now - begin:6.1f} s  {now - since:5.1f} s  {current}", flush=True)
    for line in (*skipped, *(f"{name} is wrong: {why}" for name, why in broken.items())):
        print(line, flush=True)
    return rows


def with_kept(new: Entries, old: Entries, above: int) -> dict[Case, Mapping[int, tables.Times]]:
    """New entries with the old ones of more than ``above`` rows, and what only the old have.

    Old rows up to ``above`` of a case that was measured are left out, even where the new ones lack
    them: they do not know the new tactics.
    """
    made: dict[Case, Mapping[int, tables.Times]] = dict(old)
    for case, rows in new.items():
        kept = {m: times for m, times in old.get(case, {}).items() if m > above}
        made[case] = {**rows, **kept}
    return made


def without_agreeing(entries: Entries, sm_count: int) -> dict[Case, Mapping[int, tables.Times]]:
    """Entries without those of other groups whose fastest tactics another case gives as well."""
    by_name = {tactic.name: tactic for tactic in LIBRARY.tactics}
    kept = {case: rows for case, rows in entries.items() if case.group_size == 128}
    for case, rows in entries.items():
        if case not in kept and not _agrees(kept, case, rows, sm_count, by_name):
            kept[case] = rows
    return kept


def _agrees(
    kept: Entries,
    case: Case,
    rows: Mapping[int, tables.Times],
    sm_count: int,
    by_name: Mapping[str, Tactic],
) -> bool:
    for m, times in rows.items():
        ranked = tables.rank(kept, case, m, sm_count, by_name).tactics
        taken = next((name for name, _ in ranked if name in times), None)
        if taken is None or times[taken] > AGREEING * min(times.values()):
            return False
    return True


def state() -> str:
    """Driver, clocks, power and temperature of the first GPU, as nvidia-smi tells them."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
    command = ["nvidia-smi", "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return f"unknown: {error}"[:200]
    return done.stdout.strip()


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
