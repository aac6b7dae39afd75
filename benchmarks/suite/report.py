"""The Markdown report, and what a run leaves in its folder.

python -m benchmarks.suite.report RESULT.json [--out DIR]

makes the report and the plots of a result anew, on any machine.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.suite import results, tables
from benchmarks.suite.cases import Case, Weight, parse
from benchmarks.suite.errors import BenchError, Missing, UsageError
from benchmarks.suite.results import MODES, CaseResult, Mode, Result
from benchmarks.suite.tables import Mean, Pick

_MODES: dict[Mode, str] = {
    "burst": "burst: each round after a pause",
    "sustained": "sustained: after a long run of all contenders",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, metavar="RESULT.json")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: the result's folder")
    parser.add_argument("--no-plots", action="store_true")
    options = parser.parse_args(arguments)
    try:
        result = results.load(options.result)
        folder = options.out or options.result.parent
        written = [write_text(result, folder)]
        written += _plots(result, folder, options.no_plots)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in written:
        print(path)
    return 0


def write(result: Result, folder: Path, *, plots: bool = True) -> list[Path]:
    """Result, report and plots; without matplotlib no plots, which is said on stderr."""
    written = [write_json(result, folder), write_text(result, folder)]
    return written + _plots(result, folder, not plots)


def write_json(result: Result, folder: Path) -> Path:
    return put(folder / "result.json", results.dumps(result))


def write_text(result: Result, folder: Path) -> Path:
    return put(folder / "report.md", markdown(result))


def _plots(result: Result, folder: Path, none: bool) -> list[Path]:
    if none:
        return []
    from benchmarks.suite import plots

    try:
        return plots.draw(result, folder)
    except Missing as error:
        print(f"no plots: {error}", file=sys.stderr)
        return []


def put(path: Path, text: str) -> Path:
    """Through a temporary file: a reader, or a run that is killed, never leaves half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def wrong(result: Result) -> list[str]:
    """What of this library gave wrong results, or failed."""
    return [
        f"{case.case}: {line.label}: {line.note}"
        for case in result.cases
        for line in case.lines
        if line.broken
    ]


# ---- The page ----


def markdown(result: Result) -> str:
    parts = [f"# {result.environment.get('device', 'a GPU')}: {result.suite}"]
    parts += [_head(result), _method(result)]
    if bad := wrong(result):
        parts.append("**Wrong or failed:**\n\n" + "\n".join(f"- {line}" for line in bad))
    for group, zeros in tables.quantisations(result):
        parts += _summaries(result, group, zeros)
    if cost := _costs(result):
        parts.append(cost)
    parts.append(_details(result))
    parts.append(_absent(result))
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(result: Result) -> str:
    env, made = result.environment, result.made
    library = env.get("library", {})
    rows = [
        ("command", f"`{made.get('command', '')}`"),
        ("date", f"{made.get('date', '')}, {made.get('seconds', '?')} s"),
        ("device", f"{env.get('device')}, {env.get('sm_count')} SMs, driver {env.get('driver')}"),
        ("torch", f"{env.get('torch')} (CUDA {env.get('torch_cuda')}), Python {env.get('python')}"),
        (
            "library",
            f"{library.get('version')}, {library.get('release')}, C API"
            f" {library.get('api_version')}, {library.get('tactics')} tactics, digest"
            f" `{library.get('digest')}`, bundle `{str(library.get('bundle_digest'))[:16]}`",
        ),
        ("table of tactics", str(env.get("table", ""))),
        *((name, text) for name, text in result.contenders.items() if name != "library"),
        *(("clocks", text) for text in _clocks(result)),
        *(("note", note) for note in result.notes),
    ]
    return _table(("what", ""), rows)


def _clocks(result: Result) -> list[str]:
    """What the clocks and the power were over all cases."""
    found = []
    for when in ("burst", "sustained"):
        noted = [c.conditions[when] for c in result.cases if c.conditions.get(when)]
        parts = []
        for key, unit in (("sm_mhz", "MHz"), ("power_w", "W"), ("temperature_c", "C")):
            values = [one[key] for one in noted if key in one]
            if values:
                parts.append(f"{min(values):.0f} to {max(values):.0f} {unit}")
        if parts:
            found.append(f"{when}: {', '.join(parts)}")
    return found


def _method(result: Result) -> str:
    s = result.settings
    if not s:
        return ""
    sustained = [case.case.m for case in result.cases if tables.ours(case, "sustained")]
    since = f" (from M = {min(sustained)} on)" if sustained else ""
    rates = [f"{rate:.0f} TFLOP/s {mode}" for mode in MODES if (rate := result.tflops(mode))]
    empty = (
        f" An empty kernel in a graph takes {result.empty.median:.2f} us." if result.empty else ""
    )
    return (
        f"Median microseconds of a launch over {s.get('replays')} replays"
        f" ({s.get('replays_many_rows')} from M = {s.get('many_rows')} on) of a CUDA graph of"
        f" {s.get('launches')} launches ({s.get('launches_many_rows')} or more from"
        f" M = {s.get('many_rows')} on), after {s.get('warm')} to warm up; every round runs every"
        f" contender once. Weights, activations and outputs take turns over"
        f" {int(s.get('rotation_bytes', 0)) >> 20} MiB; data is random. In a *burst* every"
        f" round follows a pause of {s.get('pause_s')} s (from M = {s.get('sustained_from')} on);"
        f" *sustained*{since} follows"
        f" {s.get('sustain_s')} s of all contenders in turns. Every line was compared with float64"
        f" arithmetic before it was timed (relative error at most {s.get('limit'):g}, BF16"
        f" {s.get('limit_bf16'):g}).\n\n"
        "*Floor*: the larger of the time in which a kernel that only reads the same bytes finishes,"
        f" and 2MNK at the rate of torch's FP16 matmul ({', '.join(rates) or 'not measured'}), both"
        f" measured in this run.{empty} *Fraction* is floor over time, 1 the limit. *Best*"
        " is the fastest of the tactics in this very run, which flatters it a little; *auto* is"
        " what the package takes. Tactics were chosen for this by a short pass over all of them."
    )


def _summaries(result: Result, group: int, zeros: bool) -> list[str]:
    title = f"group {group}" if group else "per column"
    parts = [f"## {title}{', zeros' if zeros else ''}"]
    for mode in MODES:
        rows = tables.with_rows(result, group, zeros)
        rows = {m: cs for m, cs in rows.items() if any(tables.ours(c, mode) for c in cs)}
        if rows:
            parts.append(_summary(result, rows, mode))
    return parts if len(parts) > 1 else []


def _summary(result: Result, rows: dict[int, list[CaseResult]], mode: Mode) -> str:
    names = tables.peers_of(result)
    picks: list[tuple[str, Pick]] = [
        ("best", tables.ours),
        ("best, plain", tables.ours_plain),
        ("auto", tables.auto),
        ("auto, plain", tables.auto_plain),
        ("upstream", tables.upstream),
        *((name, tables.peer(name)) for name in names),
        ("best peer", tables.best_peer),
    ]
    lines = []
    for m, cases in rows.items():
        fractions = [
            tables.mean(tables.of_floor(result, case, mode, pick) for case in cases)
            for _, pick in picks
        ]
        cells = [_mean(fraction, len(cases)) for fraction in fractions]
        lines.append((str(m), str(len(cases)), *cells))
    head = ("M", "shapes", *(name for name, _ in picks))
    first = _table(head, lines)
    second = _table(
        ("M", "best / best peer", "worst", "auto / best peer", "worst", "best / upstream", "worst"),
        [
            (
                str(m),
                *_ratios(cases, mode, tables.ours, tables.best_peer),
                *_ratios(cases, mode, tables.auto, tables.best_peer),
                *_ratios(cases, mode, tables.ours, tables.upstream),
            )
            for m, cases in rows.items()
        ],
    )
    third = _by_shape(rows, mode)
    return (
        f"### {_MODES[mode]}\n\nFraction of the floor, geometric mean over shapes (in brackets: how"
        f" many of them, if not all):\n\n{first}\n\nTimes faster, geometric mean and the worst"
        f" shape:\n\n{second}{third}"
    )


def _by_shape(rows: dict[int, list[CaseResult]], mode: Mode) -> str:
    """Best and auto against the best peer, a line for each M and a column for each shape."""
    shapes = dict.fromkeys((c.case.weight.n, c.case.weight.k) for cs in rows.values() for c in cs)
    lines = []
    for m, cases in rows.items():
        cells = dict.fromkeys(shapes, "")
        for case in cases:
            best = tables.against(case, mode, tables.ours, tables.best_peer)
            auto = tables.against(case, mode, tables.auto, tables.best_peer)
            if not math.isnan(best):
                text = f"{best:.2f}" if math.isnan(auto) else f"{best:.2f} ({auto:.2f})"
                cells[case.case.weight.n, case.case.weight.k] = text
        if any(cells.values()):
            lines.append((str(m), *cells.values()))
    if not lines:
        return ""
    table = _table(("M", *(f"{n}x{k}" for n, k in shapes)), lines)
    return f"\n\nTimes faster than the best peer, best (auto):\n\n{table}"


def _mean(mean: Mean, of: int) -> str:
    if mean.count == 0:
        return ""
    return f"{mean.value:.3f}" + (f" ({mean.count})" if mean.count != of else "")


def _ratios(cases: Iterable[CaseResult], mode: Mode, pick: Pick, other: Pick) -> tuple[str, str]:
    found = {
        f"{case.case.weight.n}x{case.case.weight.k}": tables.against(case, mode, pick, other)
        for case in cases
    }
    there = {shape: ratio for shape, ratio in found.items() if not math.isnan(ratio)}
    if not there:
        return "", ""
    worst = min(there, key=lambda shape: there[shape])
    return f"{tables.mean(there.values()).value:.2f}", f"{there[worst]:.2f} {worst}"


def _costs(result: Result) -> str:
    """What zeros and other groups cost, in percent of the time."""
    rows = []
    for group, zeros in tables.quantisations(result):
        if (group, zeros) == (128, False):
            continue
        name = (f"group {group}" if group else "per column") + (", zeros" if zeros else "")
        best = tables.costs(result, "burst", tables.ours, group, zeros)
        plain = tables.costs(result, "burst", tables.ours_plain, group, zeros)
        for m, found in best.items():
            rows.append((name, str(m), *_percent(found), *_percent(plain.get(m, {}))))
    if not rows:
        return ""
    head = ("", "M", "best", "worst shape", "best, plain", "worst shape")
    return (
        "## What zeros and other groups cost\n\nTime above that of group 128 without zeros, same"
        f" shapes, burst:\n\n{_table(head, rows)}"
    )


def _percent(ratios: dict[str, float]) -> tuple[str, str]:
    if not ratios:
        return "", ""
    worst = max(ratios, key=lambda shape: ratios[shape])
    mean = tables.mean(ratios.values()).value
    return f"{100 * (mean - 1):+.1f} %", f"{100 * (ratios[worst] - 1):+.1f} % {worst}"


def _details(result: Result) -> str:
    names = tables.peers_of(result)
    parts = [
        "## Every case\n\nMicroseconds; in brackets the spread (interquartile range, percent)."
    ]
    for weight, cases in tables.by_weight(result).items():
        read = result.read(weight)
        said = ""
        if read is not None:
            rate = read.bytes / read.times.median * 1e-6
            said = (
                f"\n\nReading its {read.bytes / 1e6:.1f} MB takes {read.times.median:.2f} us"
                f" ({rate:.2f} TB/s, {read.setting})."
            )
        rows = []
        for case in cases:
            for mode in MODES:
                if tables.ours(case, mode) is None and tables.best_peer(case, mode) is None:
                    continue
                floor = result.floor(case.case, mode)
                rows.append(
                    (
                        str(case.case.m),
                        mode,
                        "" if floor is None else f"{floor:.2f}",
                        _us(case, mode, tables.ours, named=True),
                        _us(case, mode, tables.ours_plain, named=True),
                        _us(case, mode, tables.auto, named=True),
                        _us(case, mode, tables.upstream, named=True),
                        *(_us(case, mode, tables.peer(name)) for name in names),
                    )
                )
        head = ("M", "", "floor", "best", "best, plain", "auto", "upstream", *names)
        title = f"### {weight.n} x {weight.k}, {weight.quantisation}"
        parts.append(f"{title}{said}\n\n{_table(head, rows)}")
    return "\n\n".join(parts)


def _us(case: CaseResult, mode: Mode, pick: Pick, *, named: bool = False) -> str:
    line = pick(case, mode)
    times = line.times(mode) if line else None
    if line is None or times is None:
        return ""
    mark = "" if line.method in ("graph", "") else " †"
    name = f" `{line.label}`" if named else ""
    return f"{times.median:.2f} ({100 * times.spread:.1f}){name}{mark}"


def _absent(result: Result) -> str:
    """Who failed, was wrong or left out, where, and why."""
    found: dict[tuple[str, str, str], list[Case]] = {}
    for case in result.cases:
        for line in case.lines:
            if line.status != "ok" or (line.note and line.role == "peer"):
                found.setdefault((line.label, line.status, line.note), []).append(case.case)
    rows = [
        (label, status if status != "ok" else "timed", note, _places(cases))
        for (label, status, note), cases in found.items()
    ]
    parts = []
    if rows:
        parts.append("## Notes on contenders\n\n" + _table(("who", "", "why", "where"), rows))
    if any(line.method not in ("graph", "") for case in result.cases for line in case.lines):
        parts.append("† timed as calls one by one between two events, without a graph.")
    if result.left_out:
        listed = "\n".join(f"- {text}" for text in _left_out(result.left_out))
        parts.append(f"## Left out\n\n{listed}")
    return "\n\n".join(parts)


def _left_out(texts: Iterable[str]) -> list[str]:
    """``CASE: reason`` in a line for each weight and reason; other texts as they are."""
    found: dict[tuple[Weight | None, str], list[int]] = {}
    for text in texts:
        name, _, reason = text.partition(": ")
        try:
            case = parse(name)
        except UsageError:
            found[None, text] = []
        else:
            found.setdefault((case.weight, reason), []).append(case.m)
    return [
        text if weight is None else f"{_place(weight, rows)}: {text}"
        for (weight, text), rows in found.items()
    ]


def _places(cases: Iterable[Case]) -> str:
    """Where something was, by weight, the first three of them."""
    found: dict[Weight, list[int]] = {}
    for case in cases:
        found.setdefault(case.weight, []).append(case.m)
    shown = [_place(weight, rows) for weight, rows in found.items()]
    more = [f"and {len(shown) - 3} more"] if len(shown) > 3 else []
    return "; ".join(shown[:3] + more)


def _place(weight: Weight, rows: Iterable[int]) -> str:
    return f"{weight.n} x {weight.k}, {weight.quantisation}: M = {', '.join(map(str, rows))}"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
