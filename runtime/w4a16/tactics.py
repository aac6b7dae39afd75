"""Which tactic a product takes: measured here, measured by us, like a measured one, or by rule."""

from __future__ import annotations

import hashlib
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from w4a16 import cache, tables
from w4a16.errors import ArgumentError, W4A16Warning
from w4a16.library import AUTO, LIBRARY, Device, Problem, QuantOp, Tactic

_MOST_PLANS = 1 << 16


class Plan(NamedTuple):
    """How to launch a product."""

    tactic: int
    """Index in ``LIBRARY.tactics``."""
    workspace: int
    """Bytes of device memory that the launch needs."""


class Choice(NamedTuple):
    """A tactic, and why it was taken."""

    tactic: int
    source: str
    """``"measured"``, ``"rule: like N = …"`` or ``"library's rule"``."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What is known about tactics on a GPU."""

    device: int
    gpu: str
    shipped: str
    """The table of this package that is used, or why none is."""
    cache: str
    """What the user's cache holds, or why it is not used."""
    path: Path | None
    """The cache's file, there or not; None: the cache is off."""
    problems: tuple[str, ...]
    """What was found and could not be used."""


@dataclass(frozen=True, kw_only=True)
class _Known:
    entries: tables.Entries
    sm_count: int
    sources: Sources


_plans: dict[tuple[int, int, int, int, int, int, bool, int], Plan] = {}
_known: dict[int, _Known] = {}
_lock = threading.Lock()


def plan(
    device: int,
    quant_op: int,
    m: int,
    n: int,
    k: int,
    group_size: int,
    has_bias: bool,
    fused: int = 0,
) -> Plan:
    """The tactic for a product, and its workspace; a dictionary's look-up after the first time.

    ``device`` is the CUDA ordinal of the current device; the rest is as in ``w4a16_problem``. The
    first of these that this library can launch: the fastest in the user's cache for this GPU and
    M's bucket (:data:`w4a16.tables.BUCKETS`), the fastest in the table that ships for it, what
    :func:`w4a16.tables.rank` expects from measured shapes like this one, ``W4A16_AUTO``. ``fused``
    is of a product behind a norm: how many arrays its columns go to. May be called in a graph
    capture. Raises :class:`w4a16.ArgumentError` for a problem that no kernel takes,
    :class:`w4a16.DeviceError` where none can run.
    """
    plans = _plans
    try:
        return plans[device, quant_op, m, n, k, group_size, has_bias, fused]
    except KeyError:
        pass
    problem = Problem(
        quant_op=QuantOp(quant_op), m=m, n=n, k=k, group_size=group_size, has_bias=bool(has_bias)
    )
    tactic = choose(device, problem, fused).tactic
    made = Plan(tactic, LIBRARY.workspace_size(tactic, problem))
    if len(plans) >= _MOST_PLANS:
        plans.clear()
    # Into the dictionary of before the choice: forget() meanwhile has made another.
    plans[device, quant_op, m, n, k, group_size, has_bias, fused] = made
    return made


def generation() -> object:
    """Another object after each :func:`forget`: plans that are kept elsewhere hold while it is the
    same."""
    return _plans


_OWN_RULE = "library's rule"


def choose(device: int, problem: Problem, fused: int = 0) -> Choice:
    """The tactic that :func:`plan` takes, and why."""
    known = _knowledge(device)
    case = tables.case_of(problem.quant_op, problem.group_size, problem.n, problem.k)
    ranked = tables.rank(known.entries, case, problem.m, known.sm_count, _by_name())
    if not ranked.measured and not _knows_shape(known.entries, case):
        # How a decode tactic's tiles fill the GPU depends on N alone, which the library's rule
        # knows better than other shapes do.
        auto = LIBRARY.auto_tactic(problem)
        if LIBRARY.tactics[auto].kind == "decode":
            return Choice(auto, _OWN_RULE)
    best_first = [name for name, _ in ranked.tactics]
    if fused:
        best_first = _best_in_fused_call(ranked, problem, fused > 1, known.sm_count)
    for name in best_first:
        tactic = LIBRARY.tactics[LIBRARY.tactic_index[name]]
        if accurate(tactic, problem) and not LIBRARY.why_unsupported(tactic.index, problem):
            return Choice(tactic.index, ranked.source)
    return Choice(LIBRARY.auto_tactic(problem), _OWN_RULE)


def _best_in_fused_call(
    ranked: tables.Ranked, problem: Problem, splits: bool, sm_count: int
) -> list[str]:
    """Tactics for a product behind a norm, best first; with ``splits`` its columns go to several
    arrays.

    In microseconds on an H200: a product takes its weights' bytes at 4.3 TB/s or its operations at
    650 Tflop/s, and 2.5 for starting and ending; other tactics than decode need a copy, which reads
    and writes 4 bytes an output at 3.5 TB/s. Tactics with two CTAs an SM lose 0.4, as CTAs take in
    pairs the SMs that are free first, unless all fit with one an SM: then the library keeps them
    apart.
    """
    m, n, k = problem.m, problem.n, problem.k
    best = 2.5 + max(n * k / 2 / 4.3e6, 2 * m * n * k / 650e6)

    def cost(item: tuple[str, float]) -> float:
        name, slowdown = item
        tactic = LIBRARY.tactics[LIBRARY.tactic_index[name]]
        us = slowdown * best
        if tactic.kind != "decode":
            return us + (4 * m * n / 3.5e6 if splits else 0)
        return us + (0.4 if ":o2" in name and tables.ctas_of(tactic, n, m) > sm_count else 0)

    return [name for name, _ in sorted(ranked.tactics, key=cost)]


def _knows_shape(entries: tables.Entries, case: tables.Case) -> bool:
    """Whether N and K were measured, in any group size."""
    return any((other.n, other.k) == (case.n, case.k) for other in entries)


def accurate(tactic: Tactic, problem: Problem) -> bool:
    """Whether a tactic may be chosen, apart from its speed.

    Upstream's GEMV sums in FP16: with zeros it loses more than 4 times what torch's FP16 matmul
    loses unless 512 <= K <= 4096. It is the rule that ``w4a16.h`` states for ``W4A16_AUTO``.
    """
    if tactic.name != "gemv" or problem.quant_op is not QuantOp.GROUP_SCALE_ZERO:
        return True
    return 512 <= problem.k <= 4096


def resolve(tactic: int | str | None) -> int:
    """The index of a tactic given by name or index; ``"auto"`` and None: -1.

    Raises :class:`w4a16.ArgumentError`.
    """
    if tactic is None or tactic == "auto":
        return AUTO
    if isinstance(tactic, str):
        index = LIBRARY.tactic_index.get(tactic)
        if index is not None:
            return index
    elif isinstance(tactic, int) and not isinstance(tactic, bool):
        if AUTO <= tactic < len(LIBRARY.tactics):
            return int(tactic)
    else:
        kind = type(tactic).__name__
        raise ArgumentError(f"tactic is a {kind}: expected a name, an index or None")
    names = ", ".join(LIBRARY.tactic_index)
    raise ArgumentError(
        f"tactic is {tactic!r}: expected 'auto', an index from 0 to {len(LIBRARY.tactics) - 1}"
        f" or one of {names}"
    )


def describe(device: int = -1) -> Sources:
    """Where the choices for a GPU (-1: the current one) come from, and what was ignored and why."""
    if device < 0:
        device = LIBRARY.device(device).device
    return _knowledge(device).sources


def forget() -> None:
    """Reads the tables anew at the next look-up: what another process tuned is seen then."""
    global _plans, _known
    with _lock:
        _known = {}
        _plans = {}


def key_of(device: Device) -> tables.Key:
    """Under which times measured on a GPU are stored."""
    return tables.Key(
        gpu=device.name or "unknown",
        sm=f"{device.cc_major}.{device.cc_minor}",
        sm_count=device.sm_count,
        driver=device.driver_version,
        cuda_runtime=LIBRARY.build.cuda_runtime_version,
        library=library_digest(),
    )


def library_digest() -> str:
    """What tells two libraries apart whose kernels may take other times."""
    build = LIBRARY.build
    if build.bundle_digest in ("", "unknown"):
        return hashlib.sha256(LIBRARY.path.read_bytes()).hexdigest()[:32]
    parts = (build.bundle_digest, build.compiler, build.compress, str(build.cuda_runtime_version))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


def _by_name() -> dict[str, Tactic]:
    return {tactic.name: tactic for tactic in LIBRARY.tactics}


def _knowledge(device: int) -> _Known:
    known = _known.get(device)
    if known is not None:
        return known
    with _lock:
        known = _known.get(device)
        if known is not None:
            return known
        known = _known[device] = _load(device)
    if known.sources.problems:
        warnings.warn("; ".join(known.sources.problems), W4A16Warning, stacklevel=4)
    return known


def _load(device: int) -> _Known:
    gpu = LIBRARY.device(device)
    key = key_of(gpu)
    shipped, which = tables.shipped(key.gpu, key.sm, key.sm_count)
    found = cache.read(key)
    tuned = found.table.entries if found.table else {}
    problems = [found.problem] if found.problem else []
    unknown = sorted(
        {
            name
            for rows in tuned.values()
            for times in rows.values()
            for name in times
            if name not in LIBRARY.tactic_index
        }
    )
    if unknown:
        problems.append(
            f"{found.path}: this library has no tactic {', '.join(unknown[:3])}; their times were"
            " ignored"
        )
    return _Known(
        entries=tables.merged(shipped.entries if shipped else {}, tuned),
        sm_count=gpu.sm_count,
        sources=Sources(
            device=device,
            gpu=key.gpu,
            shipped=which,
            cache=found.note,
            path=found.path,
            problems=tuple(problems),
        ),
    )
