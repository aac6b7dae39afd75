"""Times every tactic on one product, and shows which one would be taken and why."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from w4a16 import tactics
from w4a16.arguments import at_least
from w4a16.console import console
from w4a16.errors import UnsupportedError
from w4a16.library import LIBRARY, Problem
from w4a16.tables import Case
from w4a16.tune import cases_of

if TYPE_CHECKING:
    import typer


@dataclass(frozen=True, kw_only=True)
class Row:
    """One tactic on the product."""

    tactic: str
    us: float
    """Median microseconds of a launch in a CUDA graph, weights cold."""
    tflops: float
    """2 M N K a launch, in 1e12 a second."""
    gbps: float
    """Bytes of weights, scales and zeros a launch, in 1e9 a second."""
    of_best: float
    """The fastest one's time over this one's: 1 is the fastest."""
    note: str
    """Why it is never taken, or what was wrong with its result; empty for most."""
    call_us: float | None = None
    """Median microseconds of the call alone, without a graph."""
    latency_us: float | None = None
    """Median microseconds from the call until the GPU is done, without a graph."""


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Every tactic's time on one product."""

    gpu: str
    case: Case
    m: int
    bias: bool
    rows: tuple[Row, ...]
    """The fastest first."""
    taken: str
    """What :func:`w4a16.linear` takes."""
    source: str
    """Why: measured, like a measured one, or by the library's rule."""
    auto: str
    """What the library's own rule takes."""

    def as_json(self) -> str:
        """The same as JSON."""
        value: dict[str, Any] = {
            "gpu": self.gpu,
            "m": self.m,
            "n": self.case.n,
            "k": self.case.k,
            "quant_op": self.case.quant_op.name.lower(),
            "group_size": self.case.group_size,
            "bias": self.bias,
            "taken": self.taken,
            "source": self.source,
            "auto": self.auto,
            "rows": [asdict(row) for row in self.rows],
        }
        return json.dumps(value, indent=1)


def bench(
    m: int,
    n: int,
    k: int,
    *,
    group_size: int = 128,
    zeros: bool = False,
    bias: bool = False,
    tactic: int | str | Sequence[int | str] | None = None,
    device: int | None = None,
    latency: bool = False,
) -> BenchResult:
    """Times tactics on ``[m, k] @ [k, n]``: random data, cold weights, CUDA graphs, taking turns.

    ``group_size`` 0 is per column; ``tactic`` names one or several (None: all that can run);
    ``latency`` also times calls without a graph. Raises :class:`w4a16.ArgumentError`,
    :class:`w4a16.UnsupportedError`, and :class:`w4a16.DeviceError` as :func:`w4a16.tune` does.
    """
    cases, _ = cases_of((n, k), group_size, zeros)
    case = cases[0]
    problem = Problem(
        quant_op=case.quant_op, m=m, n=n, k=k, group_size=case.group_size, has_bias=bias
    )
    auto = LIBRARY.auto_tactic(problem)
    indices = _indices(tactic, problem)
    from w4a16 import timing

    timing.refuse_capture()
    if device is None:
        device = timing.current_device()
    gpu = LIBRARY.device(device).name
    with timing.Timer(device) as timer:
        taken = tactics.choose(device, problem)
        timer.prepare(case, bias)
        if reason := timer.why_not(m):
            raise UnsupportedError(reason)
        times = timer.time(indices, m, quick=False)
        notes = {index: timer.wrong(index, m) for index in indices}
        calls = {index: timer.latency(index, m) for index in indices} if latency else {}
    best = min(times.values())
    rows = []
    for index in sorted(times, key=lambda t: (times[t], t)):
        us = times[index]
        chosen = LIBRARY.tactics[index]
        note = notes[index]
        if not note and not tactics.accurate(chosen, problem):
            note = "never taken: FP16 sums of that many inputs lose too much"
        call, done = calls.get(index, (None, None))
        rows.append(
            Row(
                tactic=chosen.name,
                us=us,
                tflops=2e-6 * m * n * k / us,
                gbps=weight_bytes(case) / us * 1e-3,
                of_best=best / us,
                note=note,
                call_us=call,
                latency_us=done,
            )
        )
    return BenchResult(
        gpu=gpu,
        case=case,
        m=m,
        bias=bias,
        rows=tuple(rows),
        taken=LIBRARY.tactics[taken.tactic].name,
        source=taken.source,
        auto=LIBRARY.tactics[auto].name,
    )


def weight_bytes(case: Case) -> int:
    """Bytes of a packed weight with its scales and zeros."""
    groups = case.k // case.group_size if case.group_size else 1
    per_group = 4 if case.quant_op.name == "GROUP_SCALE_ZERO" else 2
    return case.n * case.k // 2 + groups * case.n * per_group


def _indices(tactic: int | str | Sequence[int | str] | None, problem: Problem) -> list[int]:
    if tactic is None:
        return [t.index for t in LIBRARY.tactics if not LIBRARY.why_unsupported(t.index, problem)]
    given = [tactic] if isinstance(tactic, (int, str)) else list(tactic)
    indices: dict[int, None] = {}
    for item in given:
        index = tactics.resolve(item)
        if index < 0:
            index = LIBRARY.auto_tactic(problem)
        if reason := LIBRARY.why_unsupported(index, problem):
            raise UnsupportedError(reason)
        indices[index] = None
    return list(indices)


def register(app: typer.Typer) -> None:
    """Adds ``w4a16 bench``."""
    import typer

    rows = typer.Argument(..., metavar="M", help="Rows of activations.")
    outputs = typer.Argument(..., metavar="N", help="Outputs.")
    inputs = typer.Argument(..., metavar="K", help="Inputs.")
    group_size = typer.Option(
        128, "--group", metavar="SIZE", help="Inputs that share a scale; 0: all."
    )
    with_zeros = typer.Option(False, "--zeros", help="With zero points.")
    with_bias = typer.Option(False, "--bias", help="With a bias.")
    names = typer.Option([], "--tactic", metavar="NAME", help="Only this one; may be repeated.")
    with_latency = typer.Option(
        False, "--latency", help="Also the time of calls without a CUDA graph."
    )
    ordinal = typer.Option(
        None, "--device", metavar="N", help="CUDA device. Default: the current one."
    )
    as_json = typer.Option(False, "--json", help="Print JSON.")

    @app.command("bench")
    def command(
        m: int = rows,
        n: int = outputs,
        k: int = inputs,
        group: int = group_size,
        zeros: bool = with_zeros,
        bias: bool = with_bias,
        tactic: list[str] = names,
        latency: bool = with_latency,
        device: int | None = ordinal,
        json_: bool = as_json,
    ) -> None:
        """Time every tactic on one product [M, K] x [K, N]."""
        at_least("M", m, 1)
        at_least("--group", group, 0)
        at_least("--device", device, 0)
        result = bench(
            m,
            n,
            k,
            group_size=group,
            zeros=zeros,
            bias=bias,
            tactic=list(tactic) or None,
            device=device,
            latency=latency,
        )
        if json_:
            print(result.as_json())
        else:
            show(result)


def show(result: BenchResult) -> None:
    """Prints a table."""
    from rich.table import Table

    bias = ", bias" if result.bias else ""
    table = Table(title=f"{result.gpu}: M = {result.m}, {result.case}{bias}", title_justify="left")
    table.add_column("tactic", no_wrap=True)
    heads = ["us", "TFLOP/s", "GB/s", "of the best"]
    latency = any(row.latency_us is not None for row in result.rows)
    if latency:
        heads += ["call us", "latency us"]
    for head in heads:
        table.add_column(head, justify="right")
    table.add_column("")
    for row in result.rows:
        cells = [f"{row.us:.2f}", f"{row.tflops:.1f}", f"{row.gbps:.0f}", f"{row.of_best:.2f}"]
        if latency:
            cells += [f"{row.call_us or math.nan:.1f}", f"{row.latency_us or math.nan:.1f}"]
        marks = [
            *([f"taken ({result.source})"] if row.tactic == result.taken else []),
            *(["library's rule"] if row.tactic == result.auto else []),
            *([row.note] if row.note else []),
        ]
        table.add_row(row.tactic, *cells, "; ".join(marks))
    out = console()
    out.print(table)
    if all(row.tactic != result.taken for row in result.rows):
        out.print(f"taken: {result.taken} ({result.source})")
