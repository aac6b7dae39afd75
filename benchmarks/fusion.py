"""LayerNorm with quantised Q, K and V projections: ``python -m benchmarks.fusion --out DIR``.

Times the fused call beside what it replaces, on one GPU with torch: every contender of a case in
its own CUDA graph, the graphs taking turns, weights rotated over more bytes than the L2 holds. A
sample is one replay, divided by the calls in the graph. Each contender is compared with float64
first, and not timed if it is wrong. Writes ``fusion.json`` and ``fusion.md``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks.suite import environment
from benchmarks.suite.contenders.base import brief
from benchmarks.suite.errors import Missing, ResultError, UsageError
from benchmarks.suite.plots import figures_or
from benchmarks.suite.report import put
from benchmarks.suite.stats import Summary, summary

SCHEMA = 1
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
HIDDEN = 4096
WIDTHS = ((4096, 4096, 4096), (4096, 1024, 1024))
GROUP = 128
EPS = 1e-5
#: Microseconds that users quote as what the fused call may take.
TARGET_US = 250.0
#: The kernel for a checkpoint's own layout reads the weight once for 8 rows.
MOST_ROWS_PLAIN = 64
#: A product's own kernel normalises no more than that.
MOST_ROWS_ONE_KERNEL = 2
#: Bytes of weights between two reads of the same ones: more than twice the L2 of an H200.
ROTATED_BYTES = 130e6
CALLS, CALLS_MANY_ROWS, MANY_ROWS = 20, 5, 512
#: Relative error against float64 beyond which a contender is wrong; upstream's GEMV makes 1.2e-3.
WRONG = 3e-3

FUSED, SEGMENTS, JOINED = "fused", "fused, segments", "fused, joined"
ONE_KERNEL = "fused, one kernel"
ALONE, NORM_THEN_OURS = "QKV product alone", "(a) layer_norm + our QKV product"
NORM_THEN_PLAIN, FUSED_PLAIN = "(b) layer_norm + gptq:plain", "fused gptq:plain"
PLAIN_ALONE = "gptq:plain alone"
FP16, COMPILED = "(c) layer_norm + FP16 matmul", "(c) the same, compiled"
#: Those in which this library has no part.
OTHERS = (FP16, COMPILED)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contender on one case; without times it did not run, or was wrong: ``note`` says why."""

    hidden: int
    widths: tuple[int, ...]
    m: int
    contender: str
    error: float | None
    """Relative, Frobenius, against float64."""
    times: Summary | None
    """Microseconds of a call."""
    note: str = ""


@dataclass(kw_only=True)
class Result:
    """What a run found."""

    schema: int = SCHEMA
    device: str = ""
    torch: str = ""
    library: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def as_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Result:
        """Raises :class:`ResultError` for what no run of this program wrote."""
        try:
            data = json.loads(text)
            found = data.get("schema")
            if found == SCHEMA:
                return cls(**{**data, "rows": [_row(row) for row in data["rows"]]})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ResultError(f"no result of this program: {brief(error)}") from None
        raise ResultError(f"schema is {found!r}, expected {SCHEMA}: take the program that wrote it")


def _row(data: dict[str, Any]) -> Row:
    times = None if data["times"] is None else Summary(**data["times"])
    return Row(**{**data, "widths": tuple(data["widths"]), "times": times})


# ---- The report ----


def markdown(result: Result) -> str:
    """Tables, and whether the goals hold; all from ``result``."""
    lines = ["# LayerNorm with quantised Q, K and V projections", ""]
    lines += [f"{result.device}, torch {result.torch}, library {result.library}.", ""]
    lines += [", ".join(f"{name} {value}" for name, value in result.settings.items()), ""]
    for hidden, widths in dict.fromkeys((row.hidden, row.widths) for row in result.rows):
        rows = [row for row in result.rows if (row.hidden, row.widths) == (hidden, widths)]
        lines += [f"## hidden {hidden}, widths {' + '.join(map(str, widths))}", ""]
        lines += ["Median microseconds; in brackets over the fused call.", ""]
        lines += _medians(rows)
        lines += ["", *verdicts(rows), ""]
        lines += ["| M | contender | avg | min | max | std | P50 | P90 | P95 | P99 | error |"]
        lines += ["| --- " * 11 + "|"]
        for row in rows:
            if row.times is None:
                lines.append(f"| {row.m} | {row.contender} | {row.note} |" + " |" * 8)
                continue
            cells = " | ".join(f"{value:.2f}" for value in asdict(row.times).values())
            lines.append(f"| {row.m} | {row.contender} | {cells} | {row.error:.1e} |")
        lines.append("")
    if result.left_out:
        lines += ["Left out: " + "; ".join(result.left_out), ""]
    return "\n".join(lines)


def _medians(rows: Sequence[Row]) -> list[str]:
    names = list(dict.fromkeys(row.contender for row in rows))
    lines = ["| M | " + " | ".join(names) + " |", "| --- " * (len(names) + 1) + "|"]
    for m in dict.fromkeys(row.m for row in rows):
        found = medians(rows, m)
        cells = []
        for name in names:
            if name not in found:
                cells.append("")
            elif name == FUSED or FUSED not in found:
                cells.append(f"{found[name]:.2f}")
            else:
                cells.append(f"{found[name]:.2f} ({found[name] / found[FUSED]:.2f})")
        lines.append(f"| {m} | " + " | ".join(cells) + " |")
    return lines


def medians(rows: Sequence[Row], m: int) -> dict[str, float]:
    """By contender, of those that ran."""
    return {row.contender: row.times.p50 for row in rows if row.m == m and row.times is not None}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A line for each goal that the rows can say something about."""
    found = {m: medians(rows, m) for m in dict.fromkeys(row.m for row in rows)}
    lines = []
    fused = {m: t[FUSED] for m, t in found.items() if FUSED in t}
    upto = {m: us for m, us in fused.items() if m <= 1024}
    if upto:
        m, us = max(upto.items(), key=lambda item: item[1])
        lines.append(
            _goal(us < TARGET_US, f"under {TARGET_US:g} us to M = 1024: worst {us:.1f} us, M = {m}")
        )
    if 1 in fused:
        lines.append(_goal(fused[1] < 9, f"M = 1 under 9 us: {fused[1]:.2f} us"))
    for most, allowed in ((1, 1.0), (16, 1.5)):
        above = {
            m: us - found[m][ALONE] for m, us in fused.items() if m <= most and ALONE in found[m]
        }
        if above:
            m, us = max(above.items(), key=lambda item: item[1])
            text = f"at most {allowed:g} us above the product alone to M = {most}: {us:+.2f} us"
            lines.append(_goal(us <= allowed, f"{text} at M = {m}"))
    over = {
        m: us / found[m][NORM_THEN_OURS] for m, us in fused.items() if NORM_THEN_OURS in found[m]
    }
    if over:
        m, ratio = max(over.items(), key=lambda item: item[1])
        lines.append(
            _goal(ratio <= 1, f"never slower than (a): worst {ratio:.3f} of its time, M = {m}")
        )
    if PLAIN_ALONE in found.get(1, {}) and ALONE in found[1]:
        ratio = found[1][PLAIN_ALONE] / found[1][ALONE]
        lines.append(
            _goal(
                ratio <= 1.6, f"gptq:plain within 1.6 of the packed product at M = 1: {ratio:.2f}"
            )
        )
    return [line for pair in ((line, "") for line in lines) for line in pair][:-1]


def _goal(holds: bool, text: str) -> str:
    return f"{'Holds' if holds else '**Does not hold**'}: {text}"


# ---- On the GPU ----


@dataclass
class _Weight:
    """One random weight in every form that a contender reads."""

    packed: Any
    """w4a16.PackedWeight of all columns."""
    fused: Any
    plain: Any
    half: Any | None
    """FP16 [K, N]; None for copies that only the packed contenders rotate over."""


Call = Callable[[_Weight], Any]


class Case:
    """A shape with its weights and activations."""

    def __init__(self, hidden: int, widths: tuple[int, ...], seed: int) -> None:
        import torch
        import w4a16
        from w4a16 import fused

        self.hidden, self.widths = hidden, widths
        n = sum(widths)
        source = torch.Generator("cuda").manual_seed(seed)

        def words(*shape: int) -> Any:
            return torch.randint(-(2**31), 2**31, shape, generator=source, device="cuda").to(
                torch.int32
            )

        def normal(*shape: int) -> Any:
            return torch.randn(shape, generator=source, device="cuda")

        self.ln_weight, self.ln_bias = normal(hidden).half(), normal(hidden).half()
        self._normal = normal
        self.weights: list[_Weight] = []
        for _ in range(max(2, math.ceil(ROTATED_BYTES / (n * hidden / 2)))):
            scales = torch.exp2(normal(hidden // GROUP, n) * 0.3 - 8).half()
            tensors = {
                "qweight": words(hidden // 8, n),
                "qzeros": words(hidden // GROUP, n // 8),
                "scales": scales,
            }
            plain = fused.GPTQTensors.of(tensors, group_size=GROUP, widths=widths)
            packed = w4a16.pack(tensors, format="gptq", group_size=GROUP)
            half = w4a16.dequantize(packed) if len(self.weights) < 2 else None
            self.weights.append(
                _Weight(
                    packed=packed,
                    fused=fused.fuse_qkv(packed, widths=widths),
                    plain=plain,
                    half=half,
                )
            )

    def contenders(self, m: int, compiled: bool) -> Iterator[tuple[str, Call]]:
        """Each as a call on one of the weights; the activations are the same for all."""
        import torch
        import w4a16
        from w4a16 import fused
        from w4a16.library import LIBRARY, RUN_OVERLAP, GptqArgs

        x = self.x = self._normal(m, self.hidden).half()
        norm, shape = torch.nn.functional.layer_norm, (self.hidden,)
        ln = (self.ln_weight, self.ln_bias)
        n = sum(self.widths)

        def gptq(a: Any, weight: _Weight) -> Any:
            w, out = weight.plain, torch.empty((m, n), dtype=torch.float16, device="cuda")
            args = GptqArgs(
                flags=RUN_OVERLAP,  # as the fused calls and w4a16.linear have it
                m=m,
                k=self.hidden,
                group_size=GROUP,
                zero_offset=1,
                a=a.data_ptr(),
                qweight=w.qweight.data_ptr(),
                qzeros=w.qzeros.data_ptr(),
                scales=w.scales.data_ptr(),
            )
            args.n[0], args.c[0] = n, out.data_ptr()
            LIBRARY.gptq_linear(args, torch.cuda.current_stream().cuda_stream)
            return out

        yield FUSED, lambda w: fused.layernorm_qkv(x, w.fused, *ln, EPS)
        for name, joined in ((SEGMENTS, False), (JOINED, True)):
            yield name, lambda w, j=joined: fused.layernorm_qkv(x, w.fused, *ln, EPS, joined=j)  # type: ignore[misc]
        if m <= MOST_ROWS_ONE_KERNEL:
            one = {"joined": True, "one_kernel": True}
            yield ONE_KERNEL, lambda w: fused.layernorm_qkv(x, w.fused, *ln, EPS, **one)
        yield NORM_THEN_OURS, lambda w: w4a16.linear(norm(x, shape, *ln, EPS), w.packed)
        rows = norm(x, shape, *ln, EPS)
        yield ALONE, lambda w: w4a16.linear(rows, w.packed)
        if m <= MOST_ROWS_PLAIN:
            yield FUSED_PLAIN, lambda w: fused.layernorm_qkv(x, w.plain, *ln, EPS)
            yield NORM_THEN_PLAIN, lambda w: gptq(norm(x, shape, *ln, EPS), w)
            yield PLAIN_ALONE, lambda w: gptq(rows, w)
        yield FP16, lambda w: _fp16(x, *ln, w.half)
        if compiled:
            yield COMPILED, lambda w: _compiled()(x, *ln, w.half)

    def error(self, found: Any) -> float:
        """Of at most 16 rows, against float64 on the first weight."""
        import torch

        whole = (
            found
            if isinstance(found, torch.Tensor) and found.dim() == 2
            else torch.cat(list(found), -1)
        )
        x = self.x[:16].double()
        x = x - x.mean(1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(1, keepdim=True) + EPS)
        x = x * self.ln_weight.double() + self.ln_bias.double()
        exact = x @ self.weights[0].half.double()  # type: ignore[union-attr]
        norm = torch.linalg.vector_norm
        return float(norm(whole[:16].double() - exact) / norm(exact))


def _fp16(x: Any, ln_weight: Any, ln_bias: Any, weight: Any) -> Any:
    import torch

    return torch.nn.functional.layer_norm(x, x.shape[-1:], ln_weight, ln_bias, EPS) @ weight


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """Once for any number of rows."""
    import torch

    made: Callable[..., Any] = torch.compile(_fp16, dynamic=True)
    return made


class _Graph:
    """Calls on the weights in turn, captured."""

    def __init__(self, call: Call, weights: Sequence[_Weight], count: int) -> None:
        import torch

        for weight in weights:
            call(weight)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        self._count = count
        with torch.cuda.graph(self._graph):
            for i in range(count):
                call(weights[i % len(weights)])
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._graph.replay()
        torch.cuda.synchronize()

    def samples(self, replays: int) -> list[float]:
        """Microseconds of a call, for each replay."""
        found = []
        begin, end = self._events
        for _ in range(replays):
            begin.record()
            self._graph.replay()
            end.record()
            end.synchronize()
            found.append(begin.elapsed_time(end) * 1e3 / self._count)
        return found


def run(options: argparse.Namespace) -> Result:
    """Needs a GPU that the library runs on."""
    import torch
    from w4a16.library import LIBRARY

    LIBRARY.check_device()
    build = LIBRARY.build
    result = Result(
        device=torch.cuda.get_device_name(),
        torch=str(torch.__version__),
        library=f"{build.version} ({build.bundle_digest[:12]})",
        settings={
            "group": GROUP,
            "zeros": "yes",
            "calls a graph": f"{CALLS} ({CALLS_MANY_ROWS} from M = {MANY_ROWS})",
            "replays": options.replays,
            "rounds": options.rounds,
            "seed": options.seed,
        },
    )
    begin = time.monotonic()
    with torch.no_grad():
        for widths in options.widths:
            case = Case(options.hidden, widths, options.seed)
            for m in options.rows:
                if time.monotonic() - begin > options.limit:
                    result.left_out.append(
                        f"widths {widths} M = {m}: {options.limit:g} s were over"
                    )
                    continue
                result.rows += _timed(case, m, options)
                print(f"{widths} M = {m}: " + ", ".join(_short(result.rows, widths, m)), flush=True)
            del case
            torch.cuda.empty_cache()
    return result


def _timed(case: Case, m: int, options: argparse.Namespace) -> list[Row]:
    count = CALLS_MANY_ROWS if m >= MANY_ROWS else CALLS
    graphs: dict[str, _Graph] = {}
    errors: dict[str, float] = {}
    notes: dict[str, str] = {}
    for name, call in case.contenders(m, options.compiled):
        try:
            errors[name] = case.error(call(case.weights[0]))
            if not errors[name] <= WRONG:
                notes[name] = f"wrong: relative error {errors[name]:.1e}"
                continue
            weights = (
                [w for w in case.weights if w.half is not None] if name in OTHERS else case.weights
            )
            graphs[name] = _Graph(call, weights, count)
        except Exception as reason:  # a contender that fails is a line, not the end of the run
            notes[name] = brief(reason)
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(options.rounds):
        for name, graph in graphs.items():
            samples[name] += graph.samples(options.replays)
    return [
        Row(
            hidden=case.hidden,
            widths=case.widths,
            m=m,
            contender=name,
            error=errors.get(name),
            times=summary(samples[name]) if name in samples else None,
            note=notes.get(name, ""),
        )
        for name in dict.fromkeys([*errors, *notes])
    ]


def _short(rows: Sequence[Row], widths: tuple[int, ...], m: int) -> list[str]:
    here = [row for row in rows if row.m == m and row.widths == widths]
    return [
        f"{row.contender} {row.note or 'nothing' if row.times is None else f'{row.times.p50:.2f}'}"
        for row in here
    ]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def parsed(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("artifacts/bench-fusion"), metavar="DIR")
    parser.add_argument("--rows", type=_numbers, default=ROWS, metavar="M,M,…")
    parser.add_argument("--hidden", type=int, default=HIDDEN)
    parser.add_argument(
        "--widths", type=_numbers, action="append", metavar="Q,K,V", help="may be repeated"
    )
    parser.add_argument("--replays", type=int, default=40, help="of a graph in a row")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contender takes")
    parser.add_argument("--limit", type=float, default=600.0, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--no-compile", dest="compiled", action="store_false")
    parser.add_argument("--report", type=Path, metavar="JSON", help="only make the page anew")
    options = parser.parse_args(arguments)
    options.widths = options.widths or list(WIDTHS)
    if options.hidden < GROUP or options.hidden % GROUP:
        raise UsageError(f"--hidden {options.hidden}: expected a multiple of {GROUP}")
    for widths in options.widths:
        if len(widths) != 3 or any(n < 8 or n % 8 for n in widths):
            given = ",".join(map(str, widths))
            raise UsageError(f"--widths {given}: expected three multiples of 8, of Q, K and V")
    if min(options.rows) < 1:
        raise UsageError(f"--rows {','.join(map(str, options.rows))}: expected numbers above 0")
    if options.replays < 1 or options.rounds < 1:
        raise UsageError("--replays and --rounds must be above 0")
    if not options.limit > 0:
        raise UsageError(f"--limit {options.limit:g}: expected seconds above 0")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parsed(arguments)
    if options.report is not None:
        result = load(options.report)
    else:
        environment.find_library()
        environment.load_torch()
        from w4a16.errors import W4A16Error

        try:
            result = run(options)
        except (W4A16Error, ImportError) as reason:
            raise Missing(f"cannot run: {reason}") from reason
    put(options.out / "fusion.json", result.as_json())
    put(options.out / "fusion.md", markdown(result))
    try:
        draw(result, options.out / "fusion.png")
    except Missing as reason:
        print(f"not drawn: {reason}", file=sys.stderr)
    for widths in dict.fromkeys(row.widths for row in result.rows):
        print(f"widths {' + '.join(map(str, widths))}")
        rows = [row for row in result.rows if row.widths == widths]
        print("\n".join(f"  {line}" for line in verdicts(rows) if line))
    return 1 if failed(result) or not result.rows else 0


def load(path: Path) -> Result:
    """The result in a file; raises :class:`ResultError`."""
    try:
        return Result.from_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path} cannot be read: {error}") from None
    except ResultError as error:
        raise ResultError(f"{path}: {error}") from None


def failed(result: Result) -> list[Row]:
    """Rows of this library that were wrong, or did not run."""
    return [row for row in result.rows if row.times is None and row.contender not in OTHERS]


def draw(result: Result, path: Path) -> None:
    """Time against M for each set of widths; raises :class:`Missing` without matplotlib."""
    stored = path.with_name("fusion.json")
    figure_type = figures_or(f"python -m benchmarks.fusion --report {stored} --out {path.parent}")
    sets = list(dict.fromkeys(row.widths for row in result.rows))
    figure = figure_type(figsize=(6.5 * max(1, len(sets)), 5), layout="constrained")
    for place, widths in enumerate(sets, 1):
        axes = figure.add_subplot(1, len(sets), place)
        for contender in dict.fromkeys(row.contender for row in result.rows):
            points = sorted(
                (row.m, row.times.p50)
                for row in result.rows
                if row.widths == widths and row.contender == contender and row.times is not None
            )
            if points:
                axes.loglog(*zip(*points, strict=True), "-o", markersize=3, label=contender)
        axes.set(title=" + ".join(map(str, widths)), xlabel="rows (M)", ylabel="microseconds (P50)")
        axes.grid(visible=True, which="both", alpha=0.3)
    if sets:
        figure.axes[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    from benchmarks.suite.__main__ import main as suite

    sys.exit(suite(["--suite", "fusion", *sys.argv[1:]]))
