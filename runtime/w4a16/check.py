"""``w4a16 check``: whether every kernel and every checkpoint format is right on this GPU.

Errors are relative Frobenius errors against float64 arithmetic on the stored scales and zeros, as
multiples of what FP16 arithmetic without this library loses on the same product (torch's FP16
matmul on the dequantised weights, or where there is no torch, numpy's float32 matmul rounded once).
Every output is poisoned with NaNs between two guard bands, and every launch is made twice.
"""

from __future__ import annotations

import json
import math
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from w4a16 import arrays, driver, tactics
from w4a16.check_formats import FORMATS, Checkpoint, Format, checkpoint
from w4a16.check_math import Arithmetic, Buffer, Operand, Weight, arithmetic_of
from w4a16.console import console
from w4a16.errors import ArgumentError, DeviceError, W4A16Error, W4A16Warning
from w4a16.library import LIBRARY, Problem, QuantOp, Source, Tactic

if TYPE_CHECKING:
    import typer

    from w4a16.packed import PackedWeight

#: M of the products; one for each way that kernels split rows, and some that fill no tile.
ROWS = (1, 2, 7, 16, 33, 128, 1000)
GROUPS = (64, 128, 256)

Size: TypeAlias = Literal["quick", "default", "full"]
Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with how many parts are done, how many there are, and what is next."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One product, or one comparison."""

    part: Literal["tactic", "format"]
    name: str
    """The tactic, or the format."""
    tactic: str
    """What was launched; for ``auto`` with what it took."""
    test: Literal["product", "identity", "packing"]
    n: int
    k: int
    m: int
    quant_op: str
    group_size: int
    bias: bool = False
    error: float | None = None
    peer_error: float | None = None
    limit: float | None = None
    """The largest allowed ratio of these two."""
    problem: str = ""
    """What is wrong; empty if nothing is."""

    @property
    def ok(self) -> bool:
        return not self.problem

    @property
    def ratio(self) -> float:
        """The error as a multiple of the peer's; NaN where none was measured."""
        if self.error is None or self.peer_error is None:
            return math.nan
        return self.error / self.peer_error if self.peer_error else math.inf

    def __str__(self) -> str:
        group = f", group {self.group_size}" if self.group_size else ""
        bias = ", bias" if self.bias else ""
        launched = f" by {self.tactic}" if self.part == "format" and self.tactic else ""
        return (
            f"{self.name}{launched}: {self.test} M = {self.m}, N = {self.n}, K = {self.k},"
            f" {self.quant_op}{group}{bias}"
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What :func:`run` found."""

    gpu: str
    library: str
    peer: str
    """What errors are multiples of."""
    seed: int
    size: Size
    rows: tuple[Row, ...]
    seconds: float
    aborted: str
    """Why not everything was checked; empty if it was."""

    @property
    def failures(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if not row.ok)

    @property
    def ok(self) -> bool:
        return bool(self.rows) and not self.failures and not self.aborted

    def as_json(self) -> str:
        """The same as JSON."""
        values = asdict(self)
        values["rows"] = [
            {**asdict(row), "ratio": None if math.isnan(row.ratio) else row.ratio}
            for row in self.rows
        ]
        text = json.dumps({"ok": self.ok, **_plain(values)}, indent=1, allow_nan=False)
        return text + "\n"


def _plain(value: Any) -> Any:
    """Without what JSON has no number for."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def limit_of(tactic: Tactic, quant_op: QuantOp, k: int) -> float:
    """The largest error of a tactic, as a multiple of the peer's.

    Only upstream's GEMV sums in FP16; with zeros, over all of K.
    """
    if tactic.kind != "gemv":
        return 1.1
    return 9.0 if quant_op is QuantOp.GROUP_SCALE_ZERO and k > 4096 else 4.0


def run(
    device: int | None = None,
    *,
    size: Size = "default",
    seed: int | None = None,
    arithmetic: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Checks every tactic of the library and every format on one GPU (None: the current one).

    ``size`` says how many shapes and groups; ``seed`` makes the same random numbers again;
    ``arithmetic`` is ``"torch"`` or ``"numpy"`` (None: torch if it sees the GPU).

    Raises :class:`w4a16.ArgumentError`, and :class:`w4a16.DeviceError` where no kernel can run;
    what is wrong with results is in the report.
    """
    if size not in ("quick", "default", "full"):
        raise ArgumentError(f"size is {size!r}: expected 'quick', 'default' or 'full'")
    if seed is None:
        seed = secrets.randbelow(2**31)
    elif isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ArgumentError(f"seed is {seed!r}: expected 0 or a larger integer")
    if device is None:
        device = driver.current_device()
    LIBRARY.check_device(device)
    math_of = arithmetic_of(device, arithmetic)
    begin = time.monotonic()
    checker = _Checker(device=device, math=math_of, seed=seed, scope=scope_of(size, math_of.on_gpu))
    aborted = ""
    try:
        with math_of.active():
            checker.everything(progress)
    except (DeviceError, RuntimeError) as error:  # torch reports errors of CUDA as RuntimeError
        aborted = f"the GPU failed: {' '.join(str(error).split())[:500]}"
    return Report(
        gpu=driver.device_name(device),
        library=f"{LIBRARY.build.version} for {LIBRARY.build.architecture}, {LIBRARY.path}",
        peer=math_of.name,
        seed=seed,
        size=size,
        rows=tuple(checker.rows),
        seconds=time.monotonic() - begin,
        aborted=aborted,
    )


@dataclass(frozen=True, kw_only=True)
class Scope:
    """How much is checked."""

    shapes: tuple[tuple[int, int], ...]
    """(N, K); identity activations on the first."""
    rows: tuple[int, ...]
    groups: tuple[int, ...]
    format_shape: tuple[int, int]
    formats: tuple[Format, ...] = field(default=FORMATS)


def scope_of(size: Size, on_gpu: bool) -> Scope:
    """Without torch float64 products run on the CPU, which wants small ones."""
    shapes: tuple[tuple[int, int], ...] = ((512, 1024),)
    if size != "quick":
        shapes += ((1032, 2304), (4096, 4096)) if on_gpu else ((264, 2304),)
    if size == "full":
        shapes += ((1024, 8192), (512, 14336)) if on_gpu else ((128, 8192),)
    return Scope(
        shapes=shapes,
        rows=(1, 16, 128) if size == "quick" else ROWS,
        groups=(128,) if size == "quick" else GROUPS,
        format_shape=(1032, 2304) if on_gpu else (264, 1152),
    )


@dataclass(frozen=True, kw_only=True)
class _Stored:
    """A weight in the GPU's memory, as a launch takes it."""

    quant_op: QuantOp
    group_size: int
    n: int
    k: int
    packed: Operand
    scales: Operand
    zeros: Operand | None
    weight: Weight


@dataclass
class _Pending:
    """A row whose numbers are still on the GPU."""

    row: dict[str, Any]
    names: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, name: str, value: Any) -> None:
        self.names.append(name)
        self.values.append(value)


class _Checker:
    """Fills ``rows``."""

    def __init__(self, *, device: int, math: Arithmetic, seed: int, scope: Scope) -> None:
        self.rows: list[Row] = []
        self._device = device
        self._math = math
        self._scope = scope
        self._random = np.random.default_rng(seed)

    def everything(self, progress: Progress | None) -> None:
        variants = list(self._variants())
        total = len(variants) + len(self._scope.formats)
        say = progress or (lambda done, total, text: None)
        for done, (shape, op, group, identity) in enumerate(variants):
            what = f"N = {shape[0]}, K = {shape[1]}, {op.name.lower()}"
            say(done, total, f"{what}, group {group}" if group else what)
            self._tactics(shape, op, group, identity)
        for done, format in enumerate(self._scope.formats, len(variants)):
            say(done, total, format.name)
            self._format(format)
        say(total, total, "")

    def _variants(self) -> Iterator[tuple[tuple[int, int], QuantOp, int, bool]]:
        """Shape, quant op, group size, and whether identity activations are tried."""
        listed = {group for tactic in LIBRARY.tactics for group in tactic.groups}
        wanted = sorted({*self._scope.groups, *(listed if len(self._scope.groups) > 1 else ())})
        for turn, (n, k) in enumerate(self._scope.shapes):
            for op in QuantOp:
                for group in (0,) if op is QuantOp.PER_COLUMN else wanted:
                    if not group or k % group == 0:
                        yield (n, k), op, group, turn == 0

    # ---- Tactics ----

    def _tactics(self, shape: tuple[int, int], op: QuantOp, group: int, identity: bool) -> None:
        stored = self._stored(*shape, op, group)
        x, bias = self._activations(stored.k), self._halves(stored.n)
        product = self._math.product(x, stored.weight)
        c, workspace = self._math.buffer(), self._math.buffer()
        pending: list[_Pending] = []
        for turn, m in enumerate(self._scope.rows):
            peers: dict[bool, tuple[Any, Any]] = {}
            for tactic in LIBRARY.tactics:
                has_bias = bool((tactic.index + turn) % 2)
                problem = _problem(stored, m, has_bias)
                if LIBRARY.why_unsupported(tactic.index, problem):
                    continue
                given = bias if has_bias else None
                if has_bias not in peers:
                    exact = self._math.add(product[:m], given)
                    peer = self._math.peer(x, m, stored.weight, given)
                    peers[has_bias] = exact, self._math.error(peer, exact)
                entry = self._entry(stored, tactic, "product", m, has_bias)
                pending.append(entry)
                entry.row["limit"] = limit_of(tactic, op, stored.k)
                exact, peer_error = peers[has_bias]
                outcome = self._twice(entry, tactic, stored, x, given, problem, c, workspace)
                if outcome is not None:
                    entry.add("error", self._math.error(outcome, exact))
                    entry.add("peer_error", peer_error)
        if identity:
            pending += self._identities(stored, c, workspace)
        self._finish(pending)

    def _twice(
        self,
        entry: _Pending,
        tactic: Tactic,
        stored: _Stored,
        x: Operand,
        bias: Operand | None,
        problem: Problem,
        c: Buffer,
        workspace: Buffer,
    ) -> Any:
        """The result, after a second launch that must give the same bits; None if it failed."""
        outcomes = []
        try:
            size = LIBRARY.workspace_size(tactic.index, problem)
            for _ in range(2):
                c.arm(problem.m * problem.n * 2)
                workspace.arm(size)
                LIBRARY.run(
                    tactic.index,
                    int(problem.quant_op),
                    problem.m,
                    problem.n,
                    problem.k,
                    problem.group_size,
                    x.address,
                    stored.packed.address,
                    stored.scales.address,
                    None if stored.zeros is None else stored.zeros.address,
                    None if bias is None else bias.address,
                    c.address,
                    workspace.address if size else None,
                    size,
                    self._math.stream,
                )
                outcomes.append(c.take(problem.m, problem.n))
                entry.add("intact", outcomes[-1].intact)
                entry.add("intact", workspace.intact())
        except DeviceError as error:
            raise _lost(entry, error) from error
        except W4A16Error as error:
            entry.row["problem"] = f"the launch failed: {error}"
            return None
        first, second = outcomes
        entry.add("changed", self._math.different(first.bits, second.bits))
        return first.values

    def _identities(self, stored: _Stored, c: Buffer, workspace: Buffer) -> list[_Pending]:
        """With identity activations the GEMMs must give the dequantised weight itself."""
        identity = self._math.upload(np.eye(stored.k, dtype=np.float16))
        problem = _problem(stored, stored.k, False)
        pending = []
        for tactic in LIBRARY.tactics:
            if tactic.kind != "gemm" or LIBRARY.why_unsupported(tactic.index, problem):
                continue
            entry = self._entry(stored, tactic, "identity", stored.k, False)
            pending.append(entry)
            result = self._twice(entry, tactic, stored, identity, None, problem, c, workspace)
            if result is not None:
                entry.add("wrong", self._math.different(result, stored.weight.half))
        return pending

    def _entry(
        self,
        stored: _Stored,
        tactic: Tactic,
        test: Literal["product", "identity"],
        m: int,
        bias: bool,
    ) -> _Pending:
        return _Pending({
            "part": "tactic",
            "name": tactic.name,
            "tactic": tactic.name,
            "test": test,
            "n": stored.n,
            "k": stored.k,
            "m": m,
            "quant_op": stored.quant_op.name.lower(),
            "group_size": stored.group_size,
            "bias": bias,
        })  # fmt: skip

    # ---- Formats ----

    def _format(self, format: Format) -> None:
        n, k = self._scope.format_shape
        stored = checkpoint(format, n, k, self._random)
        op = QuantOp.GROUP_SCALE if stored.zeros is None else QuantOp.GROUP_SCALE_ZERO
        common = {
            "part": "format",
            "name": format.name,
            "n": n,
            "k": k,
            "quant_op": op.name.lower(),
            "group_size": k // stored.scales.shape[0],
            "bias": format.bias,
        }
        weight = self._math.weight(stored.q, stored.scales, stored.zeros, stored.group_of_row)
        entry = _Pending({**common, "tactic": "", "test": "packing", "m": 0, "bias": False})
        try:
            packed = self._packed(stored, weight, entry)
        except DeviceError as error:
            raise _lost(entry, error) from error
        except (W4A16Error, W4A16Warning) as error:
            entry.row["problem"] = f"packing failed: {error}"
            self._finish([entry])
            return
        self._finish([entry, *self._calls(common, stored, weight, packed)])

    def _packed(self, stored: Checkpoint, weight: Weight, entry: _Pending) -> PackedWeight:
        """Packed on the GPU; the CPU must make the same bytes, and both the same weight."""
        from w4a16.packing import dequantize, pack

        on_gpu = {name: self._math.upload(array).gpu for name, array in stored.tensors.items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error", W4A16Warning)
            packed = pack(on_gpu, config=stored.config, device=self._device)
            on_cpu = pack(stored.tensors, config=stored.config)
        mine, theirs = packed.arrays(), on_cpu.arrays()
        for name in {**mine, **theirs}:
            if name not in mine or name not in theirs:
                entry.row["problem"] = f"{name} is there on one of GPU and CPU only"
            elif not np.array_equal(_host_bytes(mine[name]), _host_bytes(theirs[name])):
                entry.row["problem"] = f"{name} is not the same from GPU and CPU"
        dequantized = self._math.result(dequantize(packed))
        entry.add("wrong", self._math.different(dequantized, weight.half))
        return packed

    def _calls(
        self, common: dict[str, Any], stored: Checkpoint, weight: Weight, packed: PackedWeight
    ) -> Iterator[_Pending]:
        """``linear`` by each GEMM tactic, and by the one that is chosen."""
        n, k = common["n"], common["k"]
        bias = None if stored.bias is None else self._math.upload(stored.bias)
        x = self._activations(k)
        product = self._math.product(x, weight)
        for m in self._scope.rows:
            exact = self._math.add(product[:m], bias)
            peer_error = self._math.error(self._math.peer(x, m, weight, bias), exact)
            rows = self._math.rows(x, m)
            problem = Problem(
                quant_op=packed.quant_op,
                m=m,
                n=packed.n,
                k=packed.k,
                group_size=packed.group_size,
                has_bias=bias is not None,
            )
            for tactic in self._callable(problem):
                taken = tactic or LIBRARY.tactics[tactics.choose(self._device, problem).tactic]
                label = taken.name if tactic else f"auto ({taken.name})"
                entry = _Pending({**common, "tactic": label, "test": "product", "m": m})
                entry.row["limit"] = min(limit_of(taken, packed.quant_op, k), 4.0)
                result = self._called(entry, rows, packed, tactic)
                if result is not None:
                    entry.add("error", self._math.error(result, exact))
                    entry.add("peer_error", peer_error)
                yield entry
        if bias is not None:
            return
        identity = self._math.rows(self._math.upload(np.eye(k, dtype=np.float16)), k)
        entry = _Pending({**common, "tactic": "auto", "test": "identity", "m": k})
        result = self._called(entry, identity, packed, None)
        if result is not None:
            entry.add("wrong", self._math.different(result[:, :n], weight.half))
        yield entry

    def _callable(self, problem: Problem) -> list[Tactic | None]:
        """None is the tactic that :func:`w4a16.linear` chooses."""
        gemms = [
            tactic
            for tactic in LIBRARY.tactics
            if tactic.kind != "gemv" and not LIBRARY.why_unsupported(tactic.index, problem)
        ]
        return [None, *gemms]

    def _called(self, entry: _Pending, x: Any, packed: PackedWeight, tactic: Tactic | None) -> Any:
        from w4a16.linear import linear

        try:
            result = linear(x, packed, tactic=None if tactic is None else tactic.index)
        except DeviceError as error:
            raise _lost(entry, error) from error
        except W4A16Error as error:
            entry.row["problem"] = f"the call failed: {error}"
            return None
        return self._math.result(result)

    # ---- Random numbers ----

    def _stored(self, n: int, k: int, op: QuantOp, group: int) -> _Stored:
        random = self._random
        groups = k // group if group else 1
        q = random.integers(0, 16, (k, n), np.uint8)
        scales = np.exp2(random.uniform(-9, -7, (groups, n))).astype(np.float16)
        zeros = None
        if op is QuantOp.GROUP_SCALE_ZERO:
            points = random.integers(0, 16, (groups, n), np.uint8)
            zeros = ((8.0 - points) * scales.astype(np.float64)).astype(np.float16)
        packed = np.empty((n, k // 2), np.uint8)
        plain = np.ascontiguousarray(q[:, 0::2] | q[:, 1::2] << 4)
        LIBRARY.pack(Source.PLAIN, plain.ctypes.data, k, n, packed.ctypes.data)
        return _Stored(
            quant_op=op,
            group_size=group,
            n=n,
            k=k,
            packed=self._math.upload(packed),
            scales=self._math.upload(scales),
            zeros=None if zeros is None else self._math.upload(zeros),
            weight=self._math.weight(q, scales, zeros, np.arange(k) // (group or k)),
        )

    def _activations(self, k: int) -> Operand:
        shape = (max(self._scope.rows), k)
        values = self._random.standard_normal(shape, np.float32)
        return self._math.upload(values.astype(np.float16))

    def _halves(self, n: int) -> Operand:
        return self._math.upload(self._random.standard_normal(n).astype(np.float16))

    # ---- Verdicts ----

    def _finish(self, pending: Sequence[_Pending]) -> None:
        """Reads what is on the GPU, and judges."""
        numbers = iter(self._math.read([value for entry in pending for value in entry.values]))
        for entry in pending:
            found: dict[str, list[float]] = {}
            for name in entry.names:
                found.setdefault(name, []).append(next(numbers))
            self.rows.append(_judged(entry.row, found))


def _lost(entry: _Pending, error: DeviceError) -> DeviceError:
    """What ends the check: after most errors of CUDA nothing runs in the process any more."""
    return DeviceError(f"{Row(**entry.row)}: {error}")


def _judged(row: dict[str, Any], found: dict[str, list[float]]) -> Row:
    error = found.get("error", [None])[0]
    peer_error = found.get("peer_error", [None])[0]
    made = Row(**{**row, "error": error, "peer_error": peer_error})
    problem = made.problem
    if not problem and any(value != 1 for value in found.get("intact", ())):
        problem = "it wrote outside of its output or workspace"
    if not problem and error is not None and math.isnan(error):
        problem = "the result has NaNs, or values that were never written"
    if not problem and error is not None and not made.ratio <= (made.limit or 0):
        problem = f"the error is {made.ratio:.2f} times the peer's, allowed is {made.limit}"
    if not problem and any(found.get("wrong", ())):
        problem = f"{found['wrong'][0]:.0f} values are not those of the dequantised weight"
    if not problem and any(found.get("changed", ())):
        problem = f"{found['changed'][0]:.0f} values differ between two launches"
    return Row(**{**row, "error": error, "peer_error": peer_error, "problem": problem})


def _problem(stored: _Stored, m: int, has_bias: bool) -> Problem:
    return Problem(
        quant_op=stored.quant_op,
        m=m,
        n=stored.n,
        k=stored.k,
        group_size=stored.group_size,
        has_bias=has_bias,
    )


def _host_bytes(array: Any) -> Any:
    """The bytes of an array of any framework."""
    host = arrays.to_host(array)
    return np.ascontiguousarray(np.asarray(host)).reshape(-1).view(np.uint8)


# ---- For people ----


def show(report: Report) -> None:
    """Prints the worst of every tactic and format, and what failed."""
    out = console()
    out.print(_table("tactic", report))
    out.print()
    out.print(_table("format", report))
    out.print()
    failures = report.failures
    for row in failures[:20]:
        out.print(f"failed: {row}: {row.problem}", style="bold red", soft_wrap=True)
    if len(failures) > 20:
        out.print(f"… and {len(failures) - 20} more: --json FILE has them all")
    if report.aborted:
        out.print(f"aborted: {report.aborted}", style="bold red", soft_wrap=True)
    verdict = "all right" if report.ok else f"{len(failures)} failed"
    out.print(
        f"{len(report.rows)} checks on {report.gpu} in {report.seconds:.1f} s: {verdict}",
        style="green" if report.ok else "bold red",
        soft_wrap=True,
    )
    out.print(
        f"Errors are relative (Frobenius) against float64, as multiples of that of {report.peer};"
        f" seed {report.seed}.",
        soft_wrap=True,
    )


def _table(part: str, report: Report) -> Any:
    from rich.table import Table

    names = list(dict.fromkeys(row.name for row in report.rows if row.part == part))
    heads = ["checks", "worst error", "× peer", "allowed", "where", "identity", ""]
    table = Table(title=f"{len(names)} {part}s", title_justify="left")
    table.add_column(part, no_wrap=True)
    for head in heads:
        table.add_column(head, justify="right" if head in heads[:4] else "left")
    for name in names:
        rows = [row for row in report.rows if (row.part, row.name) == (part, name)]
        products = [row for row in rows if row.error is not None]
        worst = max(products, key=_badness, default=None)
        exact = [row for row in rows if row.test == "identity"]
        good = all(row.ok for row in rows)
        table.add_row(
            name,
            str(len(rows)),
            "-" if worst is None else f"{worst.error:.1e}",
            "-" if worst is None else f"{worst.ratio:.3f}",
            "-" if worst is None or worst.limit is None else f"{worst.limit:g}",
            "-" if worst is None else _where(worst),
            "-" if not exact else "exact" if all(row.ok for row in exact) else "WRONG",
            "ok" if good else f"{sum(not row.ok for row in rows)} FAILED",
            style=None if good else "bold red",
        )
    return table


def _badness(row: Row) -> float:
    """How near to the limit, or beyond."""
    ratio = row.ratio / (row.limit or 1)
    return math.inf if math.isnan(ratio) else ratio


def _where(row: Row) -> str:
    launched = f" {row.tactic}" if row.part == "format" else ""
    group = f"/{row.group_size}" if row.group_size else ""
    return f"M={row.m} {row.n}×{row.k} {row.quant_op}{group}{launched}"


def register(app: typer.Typer) -> None:
    """Adds ``w4a16 check``."""
    import typer

    short = typer.Option(False, "--quick", help="One shape and few products.")
    long = typer.Option(False, "--full", help="More and larger shapes.")
    file = typer.Option(None, "--json", metavar="FILE", help="Write all rows as JSON; -: print.")
    number = typer.Option(None, "--seed", min=0, help="Of the random numbers. Default: any.")
    ordinal = typer.Option(None, "--device", min=0, help="CUDA device. Default: the current one.")

    @app.command("check")
    def command(
        quick: bool = short,
        full: bool = long,
        json_: str | None = file,
        seed: int | None = number,
        device: int | None = ordinal,
    ) -> None:
        """Check every kernel and checkpoint format on this GPU against float64."""
        if quick and full:
            raise ArgumentError("give either --quick or --full")
        target = None if json_ in (None, "-") else Path(str(json_))
        if target is not None and not target.absolute().parent.is_dir():
            raise ArgumentError(f"--json {target}: there is no folder {target.absolute().parent}")
        with _progress() as progress:
            report = run(
                device,
                size="quick" if quick else "full" if full else "default",
                seed=seed,
                progress=progress,
            )
        if target is not None:
            target.write_text(report.as_json(), encoding="utf-8")
        if json_ == "-":
            print(report.as_json(), end="")
        else:
            show(report)
        if not report.ok:
            raise typer.Exit(1)


def _progress() -> Any:
    """A context that gives a :data:`Progress`; prints nothing where nobody watches."""
    from contextlib import contextmanager

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    @contextmanager
    def made() -> Iterator[Callable[[int, int, str], None]]:
        screen = console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
        with Progress(
            *columns, console=screen, transient=True, disable=not screen.is_terminal
        ) as bar:
            task = bar.add_task("", total=None)

            def say(done: int, total: int, text: str) -> None:
                bar.update(task, completed=done, total=total, description=text)

            yield say

    return made()
