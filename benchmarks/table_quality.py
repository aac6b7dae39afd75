"""How near to the best tactic the choices come, from times that were measured once.

python -m benchmarks.table_quality RAW.json [--table TABLE.json] [--variants]

needs no GPU. ``RAW.json`` is what ``benchmarks.shipped_table`` wrote: the times of all tactics. It
prints how many times slower than the best tactic each way to choose is, as geometric mean and
worst:

* ``auto``: the library's own rule;
* ``shipped``: the table of this package (``--table``, or the one made from these times);
* ``rule``: the same without any case of that N and K, so that only others tell what to take;
* ``shipped, again`` and ``auto, again``: on the times under ``verify``, which the table has not
  seen, and on numbers of rows between its buckets.

``--variants`` shows the rule with other numbers of neighbours and reaches.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from unittest import mock

from w4a16 import tables
from w4a16.library import LIBRARY, Problem, QuantOp
from w4a16.tables import Case, Entries

from benchmarks.shipped_table import without_agreeing

BANDS = ((1, 2), (3, 16), (17, 64), (65, 256), (257, 1024), (1025, 8192))


@dataclass(frozen=True)
class Row:
    """Every tactic's time on one case and M."""

    case: Case
    m: int
    us: Mapping[str, float]
    auto: str

    def loss(self, name: str) -> float:
        """How many times slower than the best; a tactic that was given up at a smaller M counts
        as twice as slow, which it was at least."""
        best = min(self.us.values())
        return self.us.get(name, 2 * best) / best


Choose: TypeAlias = Callable[[Row], str]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("raw", type=Path)
    parser.add_argument("--table", type=Path, default=None)
    parser.add_argument("--variants", action="store_true")
    given = parser.parse_args(arguments)
    content = json.loads(given.raw.read_text(encoding="utf-8"))
    rows, again = read_rows(content["rows"]), read_rows(content.get("verify", []))
    sm_count = int(content["key"]["sm_count"])
    full = entries_of_rows(rows)
    if given.table is None:
        shipped: Entries = without_agreeing(full, sm_count)
    else:
        shipped = tables.loads(given.table.read_bytes())[0].entries
    print(f"{given.raw.name}: {len(rows)} buckets of {len(full)} cases, {len(shipped)} shipped\n")
    by_table, by_rule = choose_by(shipped, sm_count), choose_left_out(shipped, sm_count)
    report("auto", rows, lambda row: row.auto)
    report("shipped", rows, by_table)
    report("rule", rows, by_rule)
    if again:
        report("auto, again", again, lambda row: row.auto)
        report("shipped, again", again, by_table)
        report("rule, again", again, by_rule)
    if given.variants:
        for neighbours in (1, 2, 4, 8):
            for reach in (0.8, 1.6, 2.4):
                for waves in (True, False):
                    name = f"rule, {neighbours} within {reach}{'' if waves else ', no waves'}"
                    with variant(neighbours, reach, waves):
                        print(f"{name:<32} {line([row.loss(by_rule(row)) for row in rows])}")
        print()
    worst(rows, by_rule)
    return 0


def read_rows(items: Iterable[Mapping[str, Any]]) -> list[Row]:
    return [
        Row(
            case=Case(QuantOp[item["quant_op"].upper()], item["group_size"], item["n"], item["k"]),
            m=item["m"],
            us=item["us"],
            auto=item["auto"],
        )
        for item in items
    ]


def entries_of_rows(rows: Iterable[Row]) -> dict[Case, dict[int, tables.Times]]:
    kinds = {tactic.name: tactic.kind for tactic in LIBRARY.tactics}
    entries: dict[Case, dict[int, tables.Times]] = {}
    for row in rows:
        entries.setdefault(row.case, {})[row.m] = tables.shortened(row.us, kinds)
    return entries


def choose_by(entries: Entries, sm_count: int) -> Choose:
    """What :func:`w4a16.tactics.choose` takes with a table."""
    by_name = {tactic.name: tactic for tactic in LIBRARY.tactics}

    def choose(row: Row) -> str:
        ranked = tables.rank(entries, row.case, row.m, sm_count, by_name)
        problem = Problem(
            quant_op=row.case.quant_op,
            m=row.m,
            n=row.case.n,
            k=row.case.k,
            group_size=row.case.group_size,
        )
        for name, _ in ranked.tactics:
            # Times were measured of accurate tactics only.
            known = by_name[name]
            if known.kind == "gemv" and name not in row.us:
                continue
            if not LIBRARY.why_unsupported(known.index, problem):
                return name
        return row.auto

    return choose


def choose_left_out(entries: Entries, sm_count: int) -> Choose:
    """The same, without the cases of the row's own N and K."""
    without: dict[tuple[int, int], Choose] = {}

    def choose(row: Row) -> str:
        shape = (row.case.n, row.case.k)
        if shape not in without:
            others = {case: rows for case, rows in entries.items() if (case.n, case.k) != shape}
            without[shape] = choose_by(others, sm_count)
        return without[shape](row)

    return choose


@contextmanager
def variant(neighbours: int, reach: float, waves: bool) -> Iterator[None]:
    with (
        mock.patch.object(tables, "NEIGHBOURS", neighbours),
        mock.patch.object(tables, "REACH", reach),
        mock.patch.object(tables, "fill", tables.fill if waves else lambda *_: 1.0),
    ):
        yield


def report(name: str, rows: Sequence[Row], choose: Choose) -> None:
    losses = [(row, row.loss(choose(row))) for row in rows]
    print(f"{name:<32} {line([loss for _, loss in losses])}")
    for low, high in BANDS:
        part = [loss for row, loss in losses if low <= row.m <= high]
        if part:
            print(f"  {f'M = {low} to {high}':<30} {line(part)}")
    print()


def line(losses: Sequence[float]) -> str:
    mean = math.exp(sum(map(math.log, losses)) / len(losses))
    over = sum(loss > 1.05 for loss in losses) / len(losses)
    return f"{mean:.4f} mean  {max(losses):.2f} worst  {over:5.1%} over 1.05  ({len(losses)})"


def worst(rows: Sequence[Row], choose: Choose, count: int = 12) -> None:
    print("worst of the rule:")
    for row in sorted(rows, key=lambda row: -row.loss(choose(row)))[:count]:
        name = choose(row)
        best = min(row.us, key=lambda tactic: row.us[tactic])
        print(f"  {row.loss(name):.2f}  {row.case}, M = {row.m}: {name} for {best}")


if __name__ == "__main__":
    sys.exit(main())
