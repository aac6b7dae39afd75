"""Times every tactic on this GPU for given weights, and stores which is fastest."""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from w4a16 import cache, tables, tactics
from w4a16.arguments import at_least
from w4a16.console import console
from w4a16.errors import ArgumentError, W4A16Error, W4A16Warning
from w4a16.library import LIBRARY, Problem, QuantOp, Tactic
from w4a16.packed import PackedWeight
from w4a16.tables import BUCKETS, Case

if TYPE_CHECKING:
    import typer

#: A first, quick pass times all tactics; so many of the best are then timed again, properly.
FINALISTS = 4
#: A GEMM whose row tile is small for M and which was so much slower than the best at the bucket
#: before is not going to win at a larger one.
HOPELESS = 2.0
#: Decode tactics are timed where M makes at most so many blocks of their rows, or where nothing
#: else runs. Those with many rows a block are no worse than GEMM tactics at any M.
MOST_BLOCKS = 4
MANY_ROWS = 128

Progress: TypeAlias = Callable[[int, int, str], None]
"""Called with how many buckets are done, how many there are, and what is timed next."""


class Times(Protocol):
    """What tuning needs of :class:`w4a16.timing.Timer`."""

    def prepare(self, case: Case, has_bias: bool = False) -> None: ...
    def why_not(self, m: int) -> str: ...
    def time(self, tactics: Sequence[int], m: int, *, quick: bool) -> dict[int, float]: ...
    def wrong(self, tactic: int, m: int) -> str: ...


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The tactics of one case and one bucket of M."""

    case: Case
    m: int
    us: Mapping[str, float]
    """Median microseconds of a launch, the fastest first. A short pass only says of the others
    that they are slower than :attr:`finalists`."""
    finalists: frozenset[str]
    """Those that were timed properly."""
    auto: str
    """What the library's own rule takes."""

    @property
    def best(self) -> str:
        return next(iter(self.us))

    @property
    def gain(self) -> float:
        """How many times faster the best is than what the library's own rule takes; NaN if that
        was not timed."""
        return self.us.get(self.auto, math.nan) / self.us[self.best]


@dataclass(frozen=True, kw_only=True)
class TuneResult:
    """What :func:`tune` found."""

    gpu: str
    rows: tuple[Measured, ...]
    broken: Mapping[str, str]
    """Tactics that gave wrong results here, and what was wrong; they are not taken."""
    skipped: tuple[str, ...]
    """Buckets that were not timed, and why."""
    stored: Path | None
    """The cache's file, or None: ``note`` says why."""
    note: str
    seconds: float

    def entries(self) -> dict[Case, dict[int, tables.Times]]:
        """As a table holds them."""
        return entries_of(self.rows)


def tune(
    what: PackedWeight | Case | tuple[int, ...] | str | Path | Iterable[Any],
    m: int | Iterable[int] | None = None,
    *,
    group_size: int = 128,
    zeros: bool = False,
    device: int | None = None,
    progress: Progress | None = None,
    budget: float | None = None,
    quick: bool = False,
    store: bool = True,
) -> TuneResult:
    """Times every tactic that can run, and keeps the fastest for :func:`w4a16.linear`.

    ``what`` is a :class:`w4a16.PackedWeight`, a shape ``(n, k)``, ``(n, k, group_size)`` or
    ``(n, k, group_size, zeros)`` (group size 0: per column), several of those, or a model's folder
    (:func:`tune_model`); ``group_size`` and ``zeros`` are for shapes that do not say. Only shapes
    matter: the weights timed are random.
    ``m`` are numbers of rows, each of which stands for its bucket (:data:`w4a16.tables.BUCKETS`);
    None: all. ``device`` is a CUDA ordinal; None: that of the first weight, or the current one.

    Weights are rotated past the L2 and all tactics of a bucket take turns in CUDA graphs: a first
    pass over all of them, a second, longer one over the best. ``quick`` leaves out the second.
    ``budget`` (seconds) ends it early with what was timed by then. ``progress`` is called before
    each bucket. A tactic whose results are wrong is left out, with a :class:`w4a16.W4A16Warning`.

    With ``store`` the times go to the cache (:func:`w4a16.cache.folder`), where this process sees
    them at once and others when they start; if they cannot, that is a warning and in the result.

    Raises :class:`w4a16.ArgumentError`, :class:`w4a16.UnsupportedError` for a shape that no kernel
    takes, and :class:`w4a16.DeviceError` without a GPU that the kernels run on, or while a CUDA
    graph is being captured.
    """
    cases, found = cases_of(what, group_size, zeros)
    buckets = buckets_of(m)
    if budget is not None and not budget > 0:
        raise ArgumentError(f"budget is {budget!r}: expected seconds above 0, or None")
    from w4a16 import timing

    timing.refuse_capture()
    if device is None:
        device = found if found is not None else timing.current_device()
    LIBRARY.check_device(device)
    gpu = LIBRARY.device(device)
    begin = time.monotonic()
    broken: dict[str, str] = {}
    skipped: list[str] = []
    with timing.Timer(device) as timer:
        rows = tuple(
            measure(
                timer,
                [(case, buckets) for case in cases],
                broken=broken,
                skipped=skipped,
                progress=progress,
                deadline=None if budget is None else begin + budget,
                quick=quick,
            )
        )
    path, note = None, "not asked to store"
    if store and rows:
        path, note = _store(tactics.key_of(gpu), rows)
    for name, reason in broken.items():
        warnings.warn(f"tactic {name} is not used: {reason}", W4A16Warning, stacklevel=2)
    return TuneResult(
        gpu=gpu.name,
        rows=rows,
        broken=broken,
        skipped=tuple(skipped),
        stored=path,
        note=note,
        seconds=time.monotonic() - begin,
    )


def tune_model(
    path: str | Path, m: int | Iterable[int] | None = None, **options: Any
) -> TuneResult:
    """:func:`tune` for the distinct shapes of the layers in a folder.

    ``path`` holds a quantised safetensors checkpoint, or what ``w4a16 convert`` made of one.
    Options are those of :func:`tune`. Raises :class:`w4a16.FormatError` too.
    """
    return tune(model_cases(Path(path)), m, **options)


# ---- What is asked for ----


def cases_of(what: Any, group_size: int, zeros: bool) -> tuple[list[Case], int | None]:
    """The distinct cases, in their order, and the GPU that the first weight is on, if any."""
    cases: dict[Case, None] = {}
    device: int | None = None
    for item in _listed(what):
        if isinstance(item, PackedWeight):
            case = tables.case_of(item.quant_op, item.group_size, item.n, item.k)
            device = _device_of(item) if device is None else device
        elif isinstance(item, Case):
            case = item
        else:
            case = _case_of_shape(item, group_size, zeros)
        problem = Problem(
            quant_op=case.quant_op, m=1, n=case.n, k=case.k, group_size=case.group_size
        )
        try:
            LIBRARY.auto_tactic(problem)  # raises for a shape that no kernel takes
        except ArgumentError as error:
            raise type(error)(
                f"{case}: {error}; n, k and the group size (group_size=, --group; 0: per column)"
                " are those of the packed weight"
            ) from error
        cases[case] = None
    if not cases:
        raise ArgumentError("nothing to tune: expected a PackedWeight or a shape (n, k)")
    return list(cases), device


def _listed(what: Any) -> list[Any]:
    if isinstance(what, (PackedWeight, Case)):
        return [what]
    if isinstance(what, (str, Path)):
        return list(model_cases(Path(what)))
    if isinstance(what, tuple) and what and all(isinstance(size, int) for size in what):
        return [what]
    if isinstance(what, Mapping):
        return list(what.values())
    if isinstance(what, Iterable) and not isinstance(what, bytes):
        return list(what)
    raise ArgumentError(
        f"what is a {type(what).__name__}: expected a PackedWeight, a shape (n, k), several of"
        " those, or a folder"
    )


def _case_of_shape(shape: Any, group_size: int, zeros: bool) -> Case:
    wanted = "expected (n, k), (n, k, group_size) or (n, k, group_size, zeros)"
    if not isinstance(shape, (tuple, list)) or not 2 <= len(shape) <= 4:
        raise ArgumentError(f"shape {shape!r:.80}: {wanted}")
    given: list[Any] = list(shape)
    n, k, group, with_zeros = given + [group_size, zeros][len(given) - 2 :]
    for size in (n, k, group):
        if not isinstance(size, int) or isinstance(size, bool):
            raise ArgumentError(f"shape {shape!r:.80}: {size!r:.40} is no integer; {wanted}")
    if group == 0 and with_zeros:
        group = k  # one group of all inputs
    if group == 0:
        return Case(QuantOp.PER_COLUMN, 0, n, k)
    op = QuantOp.GROUP_SCALE_ZERO if with_zeros else QuantOp.GROUP_SCALE
    return Case(op, group, n, k)


def _device_of(packed: PackedWeight) -> int | None:
    from w4a16.arrays import view

    device = view(packed.packed, "packed").device
    return device if device >= 0 else None


def buckets_of(m: int | Iterable[int] | None) -> tuple[int, ...]:
    """The buckets that numbers of rows stand for, ascending."""
    if m is None:
        return BUCKETS
    given = [m] if isinstance(m, int) else list(m)
    for rows in given:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise ArgumentError(f"m is {rows!r:.40}: expected numbers of rows, each at least 1")
    if not given:
        raise ArgumentError("m is empty: expected numbers of rows, or None for all buckets")
    return tuple(sorted({tables.bucket_of(rows) for rows in given}))


def model_cases(path: Path) -> list[Case]:
    """The distinct cases of the layers in a folder, those with most weights in all first.

    A converted folder says exactly which they are; of a checkpoint it is known from names and
    shapes alone (zero points of a weight that is not said to be symmetric may all be 8).
    """
    from w4a16.checkpoint import Checkpoint
    from w4a16.converted import is_converted, open_converted

    found: list[Case] = []
    if is_converted(path):
        with open_converted(path) as converted:
            for packed in converted.layers.values():
                found.append(Case(packed.quant_op, packed.group_size, packed.n, packed.k))
    else:
        with Checkpoint(path) as checkpoint:
            for layer in checkpoint.layers.values():
                sizes = layer.sizes
                found.append(Case(layer.quant_op, layer.group_size, sizes.n, sizes.k))
    weights: dict[Case, int] = {}
    for case in found:
        weights[case] = weights.get(case, 0) + case.n * case.k
    return sorted(weights, key=lambda case: (-weights[case], case))


# ---- Timing ----


def measure(
    timer: Times,
    work: Sequence[tuple[Case, Sequence[int]]],
    *,
    broken: dict[str, str],
    skipped: list[str],
    progress: Progress | None = None,
    deadline: float | None = None,
    quick: bool = False,
) -> Iterator[Measured]:
    """Times cases in turn, each in ascending buckets; stops cleanly at the deadline.

    What is found wrong is added to ``broken`` and not timed again, what is left out to ``skipped``.
    """
    total = sum(len(buckets) for _, buckets in work)
    done = 0
    for case, buckets in work:
        timer.prepare(case)
        field = _Field(timer, case, broken, quick)
        for m in sorted(buckets):
            if deadline is not None and time.monotonic() > deadline:
                skipped.append(f"{case}: M = {m} and all after it: out of time")
                return
            if progress:
                progress(done, total, f"{case}, M = {m}")
            done += 1
            reason = timer.why_not(m)
            if reason:
                skipped.append(f"{case}: {reason}")
                continue
            measured = field.measure(m)
            if measured is None:
                skipped.append(f"{case}, M = {m}: no tactic is right")
            else:
                yield measured
    if progress:
        progress(done, total, "done")


class _Field:
    """The tactics of one case, as M grows."""

    def __init__(self, timer: Times, case: Case, broken: dict[str, str], quick: bool) -> None:
        self._timer = timer
        self._case = case
        self._broken = broken
        self._quick = quick
        self._last: tuple[int, dict[int, float]] = (0, {})
        self._checked: set[int] = set()

    def measure(self, m: int) -> Measured | None:
        problem = Problem(
            quant_op=self._case.quant_op,
            m=m,
            n=self._case.n,
            k=self._case.k,
            group_size=self._case.group_size,
        )
        auto = LIBRARY.auto_tactic(problem)
        able = [t for t in LIBRARY.tactics if self._may_run(t, problem)]
        running = [t for t in able if not _in_many_blocks(t, m)] or able
        first = self._first_pass(running, m, auto)
        if not first:
            return None
        self._last = (m, first)
        ranking = sorted(first, key=lambda t: (first[t], t))
        if self._quick:
            best = ranking
            second = dict(first)
        else:
            best = ranking[:FINALISTS]
            also = [auto] if auto in first and auto not in best else []
            second = self._timer.time([*best, *also], m, quick=False)
        if not self._right(second, m):
            # What was wrong is out by now; what comes next may be right.
            return self.measure(m)
        # The rest were slower than these, whatever a short pass made of them.
        slowest = max(second[t] for t in best)
        us = {**{t: max(value, slowest) for t, value in first.items()}, **second}
        return Measured(
            case=self._case,
            m=m,
            us=tables.fastest({self._name(t): round(value, 3) for t, value in us.items()}),
            finalists=frozenset(self._name(t) for t in second),
            auto=self._name(auto),
        )

    def _name(self, tactic: int) -> str:
        return LIBRARY.tactics[tactic].name

    def _may_run(self, tactic: Tactic, problem: Problem) -> bool:
        return (
            tactic.name not in self._broken
            and tactics.accurate(tactic, problem)
            and not LIBRARY.why_unsupported(tactic.index, problem)
        )

    def _first_pass(self, running: list[Tactic], m: int, auto: int) -> dict[int, float]:
        """Rough microseconds of all that may win."""
        before, last = self._last
        known: dict[int, float] = {}
        wanted: list[int] = []
        best = min(last.values(), default=0.0)
        for tactic in running:
            us = last.get(tactic.index)
            if us is not None and _same_work(tactic, before, m):
                known[tactic.index] = us
            elif not last or tactic.index == auto or not self._hopeless(tactic, before, us, best):
                wanted.append(tactic.index)
        if wanted:
            known.update(self._timer.time(wanted, m, quick=True))
        return known

    def _hopeless(self, tactic: Tactic, before: int, us: float | None, best: float) -> bool:
        if tactic.kind != "gemm" or before < 4 * max(tactic.tile[1], 16):
            return False
        return us is None or us > HOPELESS * best

    def _right(self, times: dict[int, float], m: int) -> bool:
        """Whether the results are; those found wrong are noted.

        The fastest is looked at for every M, the others once.
        """
        fastest = min(times, key=lambda t: (times[t], t))
        right = True
        for tactic in times if not self._quick else [fastest]:
            if tactic == fastest or tactic not in self._checked:
                wrong = self._timer.wrong(tactic, m)
                self._checked.add(tactic)
                if wrong:
                    right = False
                    self._broken[self._name(tactic)] = f"{self._case}, M = {m}: {wrong}"
        return right


def _in_many_blocks(tactic: Tactic, m: int) -> bool:
    """Whether a decode tactic would read the weights so often that any other kind wins."""
    rows = tactic.tile[1]
    return tactic.kind == "decode" and rows < MANY_ROWS and m > MOST_BLOCKS * rows


def _same_work(tactic: Tactic, one: int, other: int) -> bool:
    """Whether a GEMM computes one tile of rows for both, nearly all of it padding."""
    return tactic.kind == "gemm" and 0 < one <= other <= min(tactic.tile[1], 16)


# ---- Storing ----


def entries_of(rows: Iterable[Measured]) -> dict[Case, dict[int, tables.Times]]:
    """Measured rows as a table keeps them."""
    kinds = {tactic.name: tactic.kind for tactic in LIBRARY.tactics}
    entries: dict[Case, dict[int, tables.Times]] = {}
    for row in rows:
        kept = tables.shortened(row.us, kinds)
        entries.setdefault(row.case, {})[row.m] = {
            name: float(f"{us:.4g}") for name, us in kept.items()
        }
    return entries


def made_now() -> dict[str, str | int | float]:
    """When and with what times are measured, for people."""
    build = LIBRARY.build
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "version": build.version,
        "release": build.release,
        "compiler": build.compiler,
        "bundle_digest": build.bundle_digest,
    }


def _store(key: tables.Key, rows: Iterable[Measured]) -> tuple[Path | None, str]:
    try:
        path = cache.store(key, entries_of(rows), made_now())
    except W4A16Error as error:
        warnings.warn(f"the times were not stored: {error}", W4A16Warning, stacklevel=3)
        return None, str(error)
    tactics.forget()
    return path, "stored"


# ---- The command ----


def register(app: typer.Typer) -> None:
    """Adds ``w4a16 tune``."""
    import typer

    folder = typer.Argument(
        None, metavar="MODEL", help="Folder of a quantised checkpoint, or of a converted one."
    )
    shapes = typer.Option(
        [], "--shape", metavar="NxK", help="Outputs x inputs, instead of MODEL; may be repeated."
    )
    group_size = typer.Option(128, "--group", metavar="SIZE", help="Of --shape; 0: per column.")
    with_zeros = typer.Option(False, "--zeros", help="Of --shape: with zero points.")
    rows = typer.Option(
        None, "--m", metavar="M,M,…", help="Rows of activations. Default: 1 to 8192."
    )
    short = typer.Option(False, "--quick", help="One short pass only.")
    seconds = typer.Option(None, "--budget", metavar="SECONDS", help="Stop after that.")
    dry = typer.Option(False, "--no-store", help="Do not store what was measured.")
    ordinal = typer.Option(
        None, "--device", metavar="N", help="CUDA device. Default: the current one."
    )
    as_json = typer.Option(False, "--json", help="Print JSON.")

    @app.command("tune")
    def command(
        model: str | None = folder,
        shape: list[str] = shapes,
        group: int = group_size,
        zeros: bool = with_zeros,
        m: str | None = rows,
        quick: bool = short,
        budget: float | None = seconds,
        no_store: bool = dry,
        device: int | None = ordinal,
        json_: bool = as_json,
    ) -> None:
        """Time every tactic on this GPU, and keep the fastest for later runs."""
        if (model is None) == (not shape):
            raise ArgumentError("give either MODEL or --shape NxK")
        at_least("--group", group, 0)
        at_least("--budget", budget, 1)
        at_least("--device", device, 0)
        what: Any = [_parsed(text) for text in shape] if model is None else model_cases(Path(model))
        with _progress(quiet=json_) as progress:
            result = tune(
                what,
                None if m is None else _parsed_rows(m),
                group_size=group,
                zeros=zeros,
                device=device,
                progress=progress,
                budget=budget,
                quick=quick,
                store=not no_store,
            )
        if json_:
            print(as_json_text(result))
        else:
            show(result)


def _parsed(shape: str) -> tuple[int, int]:
    n, separator, k = shape.lower().partition("x")
    if not (separator and n.isdigit() and k.isdigit()):
        raise ArgumentError(f"--shape {shape!r}: expected NxK, such as 4096x14336")
    return int(n), int(k)


def _parsed_rows(m: str) -> list[int]:
    parts = [part.strip() for part in m.split(",")]
    if not all(part.isdigit() for part in parts):
        raise ArgumentError(f"--m {m!r}: expected numbers of rows, such as 1,16,256")
    return [int(part) for part in parts]


@contextlib.contextmanager
def _progress(quiet: bool) -> Iterator[Progress | None]:
    """A bar on stderr, if that is a terminal."""
    from rich.progress import Progress as Bar

    terminal = console(stderr=True)
    if quiet or not terminal.is_terminal:
        yield None
        return
    with Bar(console=terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, text: bar.update(
            task, completed=done, total=total, description=text
        )


def as_json_text(result: TuneResult) -> str:
    """A result as JSON."""
    return json.dumps(
        {
            "gpu": result.gpu,
            "seconds": round(result.seconds, 3),
            "stored": str(result.stored) if result.stored else None,
            "note": result.note,
            "broken": dict(result.broken),
            "skipped": list(result.skipped),
            "rows": [row_as_json(row) for row in result.rows],
        },
        indent=1,
    )


def row_as_json(row: Measured) -> dict[str, Any]:
    """A row with the times of all tactics; finalists were timed properly."""
    return {
        "quant_op": row.case.quant_op.name.lower(),
        "group_size": row.case.group_size,
        "n": row.case.n,
        "k": row.case.k,
        "m": row.m,
        "auto": row.auto,
        "finalists": sorted(row.finalists),
        "us": dict(row.us),
    }


def show(result: TuneResult) -> None:
    """Prints a table for each case."""
    from rich.table import Table

    out = console()
    cases: dict[Case, list[Measured]] = {}
    for row in result.rows:
        cases.setdefault(row.case, []).append(row)
    for case, rows in cases.items():
        table = Table(title=str(case), title_justify="left")
        table.add_column("M", justify="right")
        table.add_column("fastest", no_wrap=True)
        for head in ("us", "TFLOP/s", "over the library's rule"):
            table.add_column(head, justify="right")
        for row in rows:
            us = row.us[row.best]
            rate = 2e-6 * row.m * case.n * case.k / us
            gain = "" if math.isnan(row.gain) else f"{row.gain:.2f}"
            table.add_row(str(row.m), row.best, f"{us:.2f}", f"{rate:.1f}", gain)
        out.print(table)
    for text in result.skipped:
        out.print(f"left out: {text}")
    where = f"stored in {result.stored}" if result.stored else f"not stored: {result.note}"
    out.print(f"{len(result.rows)} buckets in {result.seconds:.1f} s, {where}")
