"""Latency mode: the distribution of one case's time, for every contender.

Each sample is a graph of LAUNCHES launches between two events, over the number of launches, with
the GPU kept busy before it; contenders take turns. A sample of one launch would be mostly the two
events: they take about a microsecond.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite.cases import Case, Job
from benchmarks.suite.report import put
from benchmarks.suite.stats import Summary, summary

LAUNCHES = 4
_HEADS = ("avg", "min", "max", "std", "P50", "P90", "P95", "P99")


@dataclass(frozen=True, kw_only=True)
class Distribution(Summary):
    """Microseconds of a launch."""

    contender: str
    samples: int

    @classmethod
    def of(cls, contender: str, us: Sequence[float]) -> Distribution:
        return cls(contender=contender, samples=len(us), **asdict(summary(us)))


def main(options: argparse.Namespace, case: Case, command: str) -> int:
    """Measures, prints and writes latency.json and latency.md."""
    from benchmarks.suite import environment

    environment.find_library()
    torch = environment.load_torch()
    from benchmarks.suite.clocks import Clocks
    from benchmarks.suite.contenders.library import Library
    from benchmarks.suite.gpu import Gpu
    from benchmarks.suite.measure import Bench, Method
    from benchmarks.suite.run import PEER_LIMIT, taking_part
    from benchmarks.suite.weights import Rows, Weights

    gpu = Gpu(torch)
    environment.check(gpu.device)
    clocks = Clocks(gpu.uuid)
    said: list[str] = []
    with gpu:
        library = Library(gpu.device, gpu.handle, everything=options.all_tactics)
        peers, versions = taking_part(options)
        for peer in peers:
            peer.warm([Job(case)])
        bench = Bench(
            gpu,
            library,
            peers,
            method=Method(),
            clocks=clocks.now,
            rows=Rows,
            peer_limit_s=options.peer_limit or PEER_LIMIT,
            say=said.append,
        )
        bench.use(Weights(torch, case.weight, gpu.l2_bytes))
        samples, auto, lines = bench.samples(case, LAUNCHES, options.samples)
        described = environment.describe(gpu, clocks)
    notes = said + [f"{o.label}: {o.status}: {o.note}" for o in lines if o.status != "ok" or o.note]
    found = [Distribution.of(name, times.us) for name, times in samples.items()]
    found.sort(key=lambda one: one.p50)
    content = {
        "format": "w4a16-bench-latency",
        "version": 1,
        "case": case.name,
        "auto": auto,
        "command": command,
        "launches_in_a_sample": LAUNCHES,
        "environment": described,
        "contenders": versions,
        "notes": notes,
        "distributions": [asdict(one) for one in found],
        "samples_us": {name: [round(us, 3) for us in times.us] for name, times in samples.items()},
    }
    text = markdown(case, auto, found, notes)
    write(options.out, content, text)
    print(text)
    return 1 if not found or any(line.broken for line in lines) else 0


def markdown(case: Case, auto: str, found: Sequence[Distribution], notes: Sequence[str]) -> str:
    """A table, the smallest median first."""
    lines = [
        f"# {case}: microseconds of a launch",
        "",
        f"Each sample is a CUDA graph of {LAUNCHES} launches between two events, over {LAUNCHES};"
        f" contenders take turns, weights are cold. The package takes `{auto}`.",
        "",
        "| contender | samples | " + " | ".join(_HEADS) + " |",
        "|" + " --- |" * (len(_HEADS) + 2),
    ]
    for one in found:
        values = (one.avg, one.min, one.max, one.std, one.p50, one.p90, one.p95, one.p99)
        cells = " | ".join(f"{value:.2f}" for value in values)
        lines.append(f"| `{one.contender}` | {one.samples} | {cells} |")
    lines += [""] * bool(notes) + [f"- {note}" for note in notes]
    return "\n".join(lines) + "\n"


def write(folder: Path, content: dict[str, Any], text: str) -> None:
    put(folder / "latency.json", json.dumps(content) + "\n")
    put(folder / "latency.md", text)
