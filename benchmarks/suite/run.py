"""The suite ``linear``: FP16 × INT4 products, side by side.

python -m benchmarks.suite --out DIR [--short | --case NAME ...] [--limit SECONDS] [...]

needs a Hopper GPU, torch, and a built library (W4A16_LIBRARY, or the newest in artifacts/); nvcc
for the floor. DIR gets result.json, report.md and, where matplotlib is, plots; they can be made
anywhere later: python -m benchmarks.suite.report DIR/result.json
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.suite import cases, compare, report, results
from benchmarks.suite.cases import Job
from benchmarks.suite.contenders import PEERS, SLOW, peers
from benchmarks.suite.contenders.base import Contender, brief
from benchmarks.suite.errors import Lost, Missing, UsageError
from benchmarks.suite.measure import Bench, Method, by_weight
from benchmarks.suite.results import CaseResult, Read, Result

#: Seconds after which the short set stops, its reports still to be written.
SHORT_LIMIT = 165.0
#: Why the cases after a lost GPU are left out.
LOST = "the GPU was lost"
#: Seconds that a peer's preparing, compiling and tuning may take in all.
PEER_LIMIT, SHORT_PEER_LIMIT = 900.0, 120.0


def main(arguments: Sequence[str]) -> int:
    begin = time.monotonic()
    options = parse(arguments)
    old = results.load(options.compare) if options.compare else None
    if options.latency:
        from benchmarks.suite import latency

        return latency.main(options, cases.parse(options.latency), _command(arguments))
    jobs = chosen(options)
    result = run(options, jobs, begin, _command(arguments))
    written = report.write(result, options.out, plots=not options.no_plots)
    for path in written:
        print(path)
    if old is not None:
        print(compare.text(old, result))
    print(f"{len(result.cases)} cases in {time.monotonic() - begin:.0f} s", flush=True)
    if any(text.endswith(f": {LOST}") for text in result.left_out):
        return 1
    return 1 if report.wrong(result) or not result.cases else 0


def _command(arguments: Sequence[str]) -> str:
    return "python -m benchmarks.suite " + shlex.join(arguments)


# ---- What is asked for ----


def parser() -> argparse.ArgumentParser:
    text = argparse.ArgumentParser(
        prog="python -m benchmarks.suite", description=(__doc__ or "").splitlines()[0]
    )
    add = text.add_argument
    add("--out", type=Path, default=Path("artifacts/bench"), metavar="DIR")
    add("--short", action="store_true", help="the short set: under 3 minutes on an H200")
    add("--case", action="append", default=[], metavar="NAME", help="such as 8192x28672:g128:m16")
    add("--limit", type=float, metavar="SECONDS", help="stop cleanly after that")
    add("--all-tactics", action="store_true", help="time every tactic properly")
    add("--no-peers", action="store_true", help="this library and the floor alone")
    add("--with", dest="more", action="append", default=[], metavar="PEER", help="although slow")
    add("--without", action="append", default=[], metavar="PEER", help="leave it out")
    add("--peer-limit", type=float, metavar="SECONDS", help="of a peer's preparing, in all")
    add("--compare", type=Path, metavar="OLD.json", help="print ratios to an earlier result")
    add("--latency", metavar="NAME", help="the distribution of one case's time, and nothing else")
    add("--samples", type=int, default=1000, metavar="N", help="of --latency, for each contender")
    add("--nvcc", default="", help="compiles the read kernel; default: on PATH")
    add("--no-plots", action="store_true")
    add("--suite", metavar="NAME", help="another suite; its --help says what it takes")
    return text


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; raises :class:`UsageError` before anything is loaded."""
    options = parser().parse_args(list(arguments))
    for name in (*options.more, *options.without):
        if name not in PEERS:
            raise UsageError(f"{name!r} is no peer: expected one of {', '.join(PEERS)}")
    for name in ("limit", "peer_limit"):
        value = getattr(options, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected seconds above 0")
    if options.samples < 10:
        raise UsageError(f"--samples {options.samples}: expected at least 10")
    if options.short and options.case:
        raise UsageError("--short and --case exclude each other")
    if options.latency and (options.short or options.case or options.compare):
        raise UsageError("--latency is of one case alone: leave --short, --case, --compare out")
    cases.named(options.case)
    if options.latency:
        cases.parse(options.latency)
    return options


def chosen(options: argparse.Namespace) -> list[Job]:
    if options.case:
        return cases.named(options.case)
    return cases.short() if options.short else cases.full()


def taking_part(options: argparse.Namespace) -> tuple[list[Contender], dict[str, str]]:
    """Peers that run, and of all peers the version, or why they do not."""
    found: list[Contender] = []
    said: dict[str, str] = {}
    for peer in peers():
        if options.no_peers or peer.name in options.without:
            said[peer.name] = "left out: not asked for"
        elif options.short and peer.name in SLOW and peer.name not in options.more:
            said[peer.name] = f"left out of --short: its tuning is slow; --with {peer.name}"
        else:
            try:
                said[peer.name] = peer.version()
                found.append(peer)
            except Missing as error:
                said[peer.name] = f"missing: {error}"
            except Exception as error:  # a peer's failure is its own line
                said[peer.name] = f"missing: {brief(error)}"
    return found, said


# ---- The run ----


def run(options: argparse.Namespace, jobs: Sequence[Job], begin: float, command: str) -> Result:
    """Measures the jobs; what it has so far is written after every weight."""
    from benchmarks.suite import environment

    environment.find_library()
    torch = environment.load_torch()
    from benchmarks.suite.clocks import Clocks
    from benchmarks.suite.gpu import Gpu

    gpu = Gpu(torch)
    environment.check(gpu.device)
    clocks = Clocks(gpu.uuid)
    with gpu:
        return _Session(options, jobs, begin, command, gpu, clocks).run()


class _Session:
    def __init__(
        self,
        options: argparse.Namespace,
        jobs: Sequence[Job],
        begin: float,
        command: str,
        gpu: Any,
        clocks: Any,
    ) -> None:
        from benchmarks.suite.contenders.library import Library
        from benchmarks.suite.environment import describe
        from benchmarks.suite.weights import Rows

        self._options, self._jobs, self._begin = options, jobs, begin
        self._gpu, self._clocks = gpu, clocks
        self._method = Method()
        limit = options.limit or (SHORT_LIMIT if options.short else math.inf)
        self._deadline = begin + limit
        self._notes: list[str] = []
        library = Library(gpu.device, gpu.handle, everything=options.all_tactics)
        taking, said = taking_part(options)
        self._peers = taking
        if clocks.problem:
            self._notes.append(clocks.problem)
        default = SHORT_PEER_LIMIT if options.short else PEER_LIMIT
        self._bench = Bench(
            gpu,
            library,
            taking,
            method=self._method,
            clocks=clocks.now,
            rows=Rows,
            peer_limit_s=options.peer_limit or default,
            say=self._notes.append,
        )
        self._result = Result(
            suite="linear",
            made={
                "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "command": command,
                "set": "short" if options.short else "cases" if options.case else "full",
            },
            environment=describe(gpu, clocks),
            settings={**asdict(self._method), **settings(gpu.l2_bytes)},
            contenders={"library": library.version(), **said},
        )

    def run(self) -> Result:
        threads = [
            threading.Thread(target=_quietly, args=(peer, list(self._jobs)), daemon=True)
            for peer in self._peers
        ]
        for thread in threads:
            thread.start()
        native = self._floors()
        left: list[str] = []
        groups = list(by_weight(self._jobs))
        for place, (weight, jobs) in enumerate(groups):
            try:
                left += self._weight(weight, jobs, native)
            except Lost as error:
                self._notes.append(f"{error}: everything after it is missing")
                done = {case.case for case in self._result.cases}
                rest = [job.case for _, others in groups[place:] for job in others]
                left += [f"{case}: {LOST}" for case in rest if case not in done]
                break
            self._keep(left)
        return self._keep(left)

    def _keep(self, left: Sequence[str]) -> Result:
        """What there is so far, on disk as well."""
        self._result = replace(
            self._result,
            made={**self._result.made, "seconds": round(time.monotonic() - self._begin, 1)},
            left_out=tuple(left),
            notes=tuple(dict.fromkeys(self._notes)),
        )
        report.write_json(self._result, self._options.out)
        return self._result

    def _floors(self) -> Any:
        """The read kernel, or None; the rates that go into the floor are measured on the way."""
        from benchmarks.suite import floor

        native = None
        method = self._method
        try:
            native = floor.Native(floor.build(self._options.nvcc))
            empty = floor.measure_empty(self._gpu, native, method.replays, method.warm)
            self._result = replace(self._result, empty=empty)
        except (Missing, OSError) as error:
            self._notes.append(f"no floor: {error}")
        rates = floor.measure_matmul(
            self._gpu, method.replays, method.warm, method.pause_s, method.sustain_s
        )
        self._result = replace(self._result, rates={str(k): v for k, v in rates.items()})
        self._gpu.torch.cuda.empty_cache()
        return native

    def _weight(self, weight: cases.Weight, jobs: Sequence[Job], native: Any) -> list[str]:
        """All cases of a weight; what was left out."""
        from benchmarks.suite import floor
        from benchmarks.suite.weights import Weights

        if time.monotonic() > self._deadline:
            return [f"{job.case}: out of time" for job in jobs]
        since = time.monotonic()
        weights: Any = None
        left: list[str] = []
        found: list[CaseResult] = []
        reads: tuple[Read, ...] = ()
        try:
            weights = Weights(self._gpu.torch, weight, self._gpu.l2_bytes)
            method = self._method
            if native is not None:
                reads = (
                    floor.measure_read(self._gpu, native, weights, method.replays, method.warm),
                )
            self._bench.use(weights)
            for job in jobs:
                if time.monotonic() > self._deadline:
                    left.append(f"{job.case}: out of time")
                    continue
                found.append(self._bench.measure(job))
        except Lost:
            raise
        except Exception as error:
            done = {case.case for case in found}
            missing = [job for job in jobs if job.case not in done]
            left += [f"{job.case}: {brief(error)}" for job in missing]
            try:
                self._gpu.synchronize()
            except Exception:
                raise Lost(f"the GPU's context was lost: {brief(error)}") from None
        finally:
            self._result = replace(
                self._result,
                reads=self._result.reads + reads,
                cases=self._result.cases + tuple(found),
            )
        self._bench.use(None)
        del weights
        self._gpu.torch.cuda.empty_cache()
        took = time.monotonic() - since
        print(f"{time.monotonic() - self._begin:6.1f} s  {took:5.1f} s  {weight}", flush=True)
        return left


def _quietly(peer: Contender, jobs: list[Job]) -> None:
    """Compiles ahead; what fails fails again, and is told, where it is used."""
    wanted = [job for job in jobs if job.peers]
    warm: Callable[[Sequence[Job]], None] = peer.warm
    try:
        warm(wanted)
    except Exception as error:
        print(f"{peer.name}: compiling ahead failed: {brief(error)}", file=sys.stderr, flush=True)


def settings(l2_bytes: int) -> dict[str, Any]:
    """What is fixed beside :class:`Method`, for the result."""
    from benchmarks.suite import floor, weights
    from benchmarks.suite.contenders import base

    return {
        "launches": weights.LAUNCHES,
        "launches_many_rows": weights.FEW_LAUNCHES,
        "many_rows": weights.MANY_ROWS,
        "rotation_bytes": weights.rotation_bytes(l2_bytes),
        "seed": weights.SEED,
        "sustained_from": cases.SUSTAINED_FROM,
        "limit": base.LIMIT,
        "limit_bf16": base.LIMIT_BF16,
        "matmul": list(floor.MATMUL),
    }
