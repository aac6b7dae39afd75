"""Builds the decode kernels, checks them against float64 and times them.

Usage: ``python -m benchmarks.decode --out DIR [--quick]`` (needs nvcc 12.3 or later and a Hopper
GPU). ``--quick`` takes the configurations that NOTES.md found best, at group 128 without zeros.
``--build-only`` compiles and stops: it needs no GPU. Objects lie in a temporary folder.

DIR/results.json has every figure, DIR/cases.jsonl what the harness wrote. The exit code is 1 if a
result is wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.decode.build import BuildError, Resources, build
from benchmarks.decode.configurations import all_configurations
from benchmarks.decode.plan import DEPENDENCES, SHAPES, full, quick

_Line = Mapping[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--only", default="", metavar="TEXT", help="in the configuration's name")
    parser.add_argument("--nvcc", default="nvcc")
    options = parser.parse_args()

    cases = quick() if options.quick else full(all_configurations())
    cases = [case for case in cases if options.only in case.configuration.name]
    configurations = tuple(dict.fromkeys(case.configuration for case in cases))
    if not configurations:
        parser.error(f"no configuration of this run has {options.only!r} in its name")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="decode-") as folder:
        try:
            program, resources = build(configurations, Path(folder), options.nvcc)
        except BuildError as error:
            print(error, file=sys.stderr)
            return 2
        _print_resources(resources)
        if options.build_only:
            return 0
        plan = Path(folder, "plan")
        plan.write_text("".join(f"{case.line}\n" for case in cases))
        written = options.out / "cases.jsonl"
        done = subprocess.run([str(program), str(plan), str(written)], check=False)
    if done.returncode not in (0, 1):
        return done.returncode
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    _print_report(lines)
    results = {
        "resources": {name: asdict(value) for name, value in resources.items()},
        "best": [dict(line) for line in _best(lines).values()],
        "lines": lines,
    }
    (options.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    return done.returncode


def _print_resources(resources: Mapping[str, Resources]) -> None:
    spills = [f"{name} {r.spill_bytes}" for name, r in resources.items() if r.spill_bytes]
    serialised = [name for name, r in resources.items() if r.serialised]
    print(f"{len(resources)} configurations; wgmma serialised in: {' '.join(serialised) or 'none'}")
    print(f"bytes spilled: {', '.join(spills) or 'none'}")


def _best(lines: Iterable[_Line]) -> dict[tuple[Any, ...], _Line]:
    """The fastest line by quantisation, M, shape, and whether launches depend on each other."""
    best: dict[tuple[Any, ...], _Line] = {}
    for line in lines:
        if line["kind"] == "time":
            place = (line["group"], line["zeros"], line["m"], line["n"], line["k"])
            key = (*place, line["dependence"] != 0)
            if key not in best or line["us"] < best[key]["us"]:
                best[key] = line
    return best


def _print_report(lines: list[_Line]) -> None:
    """Fractions of the floor, dependent launch / plain; their means over the shapes at hand."""
    for line in lines:
        if line["kind"] == "device":
            print(f"{line['name']}, {line['sms']} SMs, CUDA {line['toolkit']}")
    best = _best(lines)
    for group, zeros in sorted({key[:2] for key in best}, key=lambda key: (key[1], -key[0])):
        here = {key[2:]: line for key, line in best.items() if key[:2] == (group, zeros)}
        shapes = [s for s in SHAPES if any(key[1:3] == s for key in here)]
        print(
            f"\ngroup {group}{', zeros' if zeros else ''}: fraction of the floor, and us; ", end=""
        )
        print("first with dependent launch, then plain")
        print("| M | mean | " + " | ".join(f"{n}x{k}" for n, k in shapes) + " |")
        print("| --- " * (len(shapes) + 2) + "|")
        for m in sorted({key[0] for key in here}):
            cells = [_cell([here.get((m, n, k, pdl)) for pdl in (True, False)]) for n, k in shapes]
            means = [
                _mean(
                    line["floor"] / line["us"] for key, line in here.items() if key[::3] == (m, p)
                )
                for p in (True, False)
            ]
            print(f"| {m} | {' '.join(means)} | {' | '.join(cells)} |")
    for kind in ("refused", "wrong"):
        some = [line for line in lines if line["kind"] == kind]
        for line in some[:8]:
            launch = f"{line['name']} /{line['shares']} {DEPENDENCES[line['dependence']]}"
            problem = f"M {line['m']} N {line['n']} K {line['k']} group {line['group']}"
            print(f"{kind}: {launch}, {problem}: {line['reason']}")
        print(f"{kind}: {len(some)}")
    print(f"checked: {sum(line.get('checked', 0) for line in lines)}")


def _cell(pair: list[_Line | None]) -> str:
    fractions = " ".join(f"{x['floor'] / x['us']:.3f}" if x else "-" for x in pair)
    return fractions + " " + "/".join(f"{x['us']:.2f}" if x else "-" for x in pair)


def _mean(fractions: Iterable[float]) -> str:
    values = list(fractions)
    return f"{math.exp(sum(map(math.log, values)) / len(values)):.3f}" if values else "-"


if __name__ == "__main__":
    sys.exit(main())
