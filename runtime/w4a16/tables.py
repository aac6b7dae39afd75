"""Tables of measured tactics: what is in them, their file format, and what they say of a problem.

A table holds, for some cases (quant op, group size, N, K) and some buckets of M, the microseconds
of the tactics that were fastest there, by name. Two kinds of table have the same format: those
that ship with the package (``data/tactics-*.json``), and those that ``tune`` writes on the user's
machine (:mod:`w4a16.cache`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from w4a16.errors import FormatError
from w4a16.files import parse_json
from w4a16.library import QuantOp, Tactic

FORMAT = "w4a16-tactics"
VERSION = 1
LARGEST_FILE = 32 << 20

#: M of a problem stands for the smallest bucket that is at least M, the last one for all beyond.
#: Within a bucket the number of CTA tiles along M (16 to 256 rows) should hardly change, or a
#: tactic that fits the top pads the rows below: hence every row to 8, where a GEMV's time grows
#: with M, multiples of 64 to 512, and a step of a quarter of M at most to 2048.
BUCKETS: tuple[int, ...] = (
    *(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 448, 512),
    *(640, 768, 896, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096, 6144, 8192),
)

#: A table keeps so many tactics of a bucket, and only those so near to its best.
KEPT = 6
KEPT_WITHIN = 1.6

#: A shape that was not measured takes after this many measured ones …
NEIGHBOURS = 4
#: … that are no farther than this: the length of (log2 N, log2 K, log2 group / 8) between them.
REACH = 1.6
#: Weights fall with the square of the distance; this keeps the nearest one's finite.
_NEAR = 0.05

_LARGEST = 2**31 - 1
_LONGEST_NAME = 200
_QUANT_OPS = {op.name.lower(): op for op in QuantOp}
_DATA = Path(__file__).resolve().parent / "data"

Times: TypeAlias = Mapping[str, float]
"""Microseconds of a launch by the tactic's name, the fastest first."""


class Case(NamedTuple):
    """What tactics are measured on, apart from M. Per column: ``group_size`` 0."""

    quant_op: QuantOp
    group_size: int
    n: int
    k: int

    def __str__(self) -> str:
        group = f", group {self.group_size}" if self.group_size else ""
        return f"N = {self.n}, K = {self.k}, {self.quant_op.name.lower()}{group}"


Entries: TypeAlias = Mapping[Case, Mapping[int, Times]]
"""Times by case and bucket of M."""


@dataclass(frozen=True, kw_only=True)
class Key:
    """Where times hold: on this GPU, with this driver and library."""

    gpu: str
    sm: str
    """Compute capability: ``"9.0"``."""
    sm_count: int
    driver: int
    """The CUDA version that the driver supports, 1000 * major + 10 * minor."""
    cuda_runtime: int
    """The CUDA runtime in the library, likewise."""
    library: str
    """Digest of the library."""

    def differences(self, other: Key) -> str:
        """What is not as in ``other``; empty if they are equal."""
        return ", ".join(
            f"{name} {mine!r} instead of {theirs!r}"
            for name in _KEY_TYPES
            if (mine := getattr(self, name)) != (theirs := getattr(other, name))
        )


_KEY_TYPES: dict[str, type] = {
    "gpu": str, "sm": str, "sm_count": int, "driver": int, "cuda_runtime": int, "library": str,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Table:
    """Measured times, and where they hold."""

    key: Key
    entries: Entries
    made: Mapping[str, str | int | float] = field(default_factory=dict)
    """How they were measured, for people: date, versions, clocks."""


class Ranked(NamedTuple):
    """What a table says of a problem: tactics with their slowdowns, the best (1.0) first."""

    tactics: tuple[tuple[str, float], ...]
    source: str
    """``"measured"``, or ``"rule: like N = …"``; empty if there is nothing to say."""

    @property
    def measured(self) -> bool:
        """Whether these are the problem's own times, not its neighbours'."""
        return self.source == "measured"


# ---- Cases ----


def bucket_of(m: int) -> int:
    """The bucket that M rows belong to (1 for M = 0)."""
    for bucket in BUCKETS:
        if m <= bucket:
            return bucket
    return BUCKETS[-1]


def case_of(quant_op: int, group_size: int, n: int, k: int) -> Case:
    """The case, with the group size of per-column scales (0 or K) made 0."""
    op = QuantOp(quant_op)
    return Case(op, 0 if op is QuantOp.PER_COLUMN else int(group_size), int(n), int(k))


def fastest(times: Mapping[str, float]) -> dict[str, float]:
    """The times in ascending order (equal ones by name)."""
    return dict(sorted(times.items(), key=lambda item: (item[1], item[0])))


def shortened(times: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, float]:
    """What a table keeps: the fastest few, and the fastest of each kind of tactic.

    ``kinds`` has the kind of each name. A problem that the fastest does not take (the GEMV has not
    every group size) finds the next one here.
    """
    ordered = fastest(times)
    best = min(ordered.values())
    kept: dict[str, float] = {}
    seen: set[str] = set()
    for name, us in ordered.items():
        kind = kinds.get(name, "")
        if kind not in seen or (len(kept) < KEPT and us <= KEPT_WITHIN * best):
            kept[name] = us
        seen.add(kind)
    return kept


def merged(old: Entries, new: Entries) -> dict[Case, dict[int, Times]]:
    """Both; where both have a bucket of a case, ``new``'s."""
    result: dict[Case, dict[int, Times]] = {case: dict(rows) for case, rows in old.items()}
    for case, rows in new.items():
        result.setdefault(case, {}).update(rows)
    return result


# ---- What a table says ----


def rank(
    entries: Entries, case: Case, m: int, sm_count: int, tactics: Mapping[str, Tactic]
) -> Ranked:
    """Tactics for a problem, best first; tactics that this library lacks are left out.

    The case's own times if its bucket was measured. Otherwise the geometric mean of how much
    slower than the best each tactic was in the nearest measured cases with or without zeros alike,
    weighted by the inverse square of their distance. There the slowdown of a ping-pong tactic is
    scaled by how full its waves are: it has no stream-K, so that a last wave of few CTAs costs as
    much as a full one, and how many there are depends on N.
    """
    bucket = bucket_of(m)
    own = entries.get(case, {}).get(bucket)
    if own:
        known = [(name, us) for name, us in own.items() if name in tactics]
        if known:
            best = min(us for _, us in known)
            return Ranked(_sorted((name, us / best) for name, us in known), "measured")
    near = _neighbours(entries, case, bucket)
    scores = _scores(entries, near, case, bucket, sm_count, tactics)
    if not scores:
        return Ranked((), "")
    least = min(scores.values())
    ranking = _sorted((name, math.exp(score - least)) for name, score in scores.items())
    return Ranked(ranking, f"rule: like {near[0][1]}")


def _sorted(items: Iterable[tuple[str, float]]) -> tuple[tuple[str, float], ...]:
    return tuple(sorted(items, key=lambda item: (item[1], item[0])))


def _neighbours(entries: Entries, case: Case, bucket: int) -> list[tuple[float, Case]]:
    """The nearest cases with that bucket, by distance."""
    zeros = case.quant_op is QuantOp.GROUP_SCALE_ZERO
    found = []
    for other, rows in entries.items():
        if (other.quant_op is QuantOp.GROUP_SCALE_ZERO) is zeros and rows.get(bucket):
            away = distance(case, other)
            if away <= REACH:
                found.append((away, other))
    return sorted(found)[:NEIGHBOURS]


def distance(one: Case, other: Case) -> float:
    """How far apart two cases are, in powers of two."""
    return math.hypot(
        math.log2(one.n / other.n),
        math.log2(one.k / other.k),
        math.log2(_group(one) / _group(other)) / 8,
    )


def _group(case: Case) -> int:
    # Per column behaves like large groups; the kernels differ little from 256 on.
    return min(case.group_size or 256, 256)


def _scores(
    entries: Entries,
    near: list[tuple[float, Case]],
    case: Case,
    bucket: int,
    sm_count: int,
    tactics: Mapping[str, Tactic],
) -> dict[str, float]:
    """The logarithm of each tactic's expected slowdown, up to a constant."""
    sums: dict[str, float] = {}
    weights: dict[str, float] = {}
    listed = [entries[other][bucket] for _, other in near]
    names = {name for times in listed for name in times if name in tactics}
    for (away, other), times in zip(near, listed, strict=True):
        weight = 1 / (away + _NEAR) ** 2
        best = min(times.values())
        unlisted = _unlisted(times)
        kinds = {tactics[name].kind for name in times if name in tactics}
        for name in names:
            tactic = tactics[name]
            if tactic.kind not in kinds:
                continue  # the fastest of each kind is listed: this one could not run there
            slowdown = times[name] / best if name in times else unlisted
            slowdown *= fill(tactic, other.n, bucket, sm_count)
            slowdown /= fill(tactic, case.n, bucket, sm_count)
            sums[name] = sums.get(name, 0.0) + weight * math.log(slowdown)
            weights[name] = weights.get(name, 0.0) + weight
    return {name: total / weights[name] for name, total in sums.items()}


def _unlisted(times: Times) -> float:
    """How much slower than the best a tactic probably was that :func:`shortened` left out."""
    slowest = list(times.values())[KEPT - 1 : KEPT]
    kept = slowest[0] / min(times.values()) if slowest else KEPT_WITHIN
    return 1.1 * min(kept, KEPT_WITHIN)


def fill(tactic: Tactic, n: int, m: int, sm_count: int) -> float:
    """The part of its waves of CTAs that a ping-pong GEMM fills; 1 for all others."""
    if tactic.kind != "gemm" or tactic.schedule != "pingpong" or sm_count <= 0:
        return 1.0
    ctas = ctas_of(tactic, n, m)
    return ctas / (-(-ctas // sm_count) * sm_count)


def ctas_of(tactic: Tactic, n: int, m: int) -> int:
    """The CTAs of a GEMM or decode tactic's launch, those that only fill a cluster included."""
    along_n = _tiles(n, tactic.tile[0], tactic.cluster[0])
    along_m = _tiles(m, tactic.tile[1], tactic.cluster[1])
    return along_n * along_m * max(tactic.cluster[2], 1)


def _tiles(extent: int, tile: int, cluster: int) -> int:
    step = max(tile, 1) * max(cluster, 1)
    return -(-extent // step) * max(cluster, 1)


# ---- The format ----


def dumps(table: Table) -> str:
    """The table as JSON, a line a case; the same text for the same table."""
    names = sorted({name for rows in table.entries.values() for t in rows.values() for name in t})
    index = {name: i for i, name in enumerate(names)}
    head = {
        "format": FORMAT,
        "version": VERSION,
        "key": {name: getattr(table.key, name) for name in _KEY_TYPES},
        "made": dict(sorted(table.made.items())),
        "tactics": names,
    }
    lines = []
    for case, rows in sorted(table.entries.items()):
        times = {
            str(m): [[index[name], us] for name, us in fastest(rows[m]).items()]
            for m in sorted(rows)
        }
        line = {
            "quant_op": case.quant_op.name.lower(),
            "group_size": case.group_size,
            "n": case.n,
            "k": case.k,
            "times": times,
        }
        lines.append(json.dumps(line, separators=(",", ":"), allow_nan=False))
    text = json.dumps(head, indent=1, allow_nan=False)
    return text[: text.rindex("\n}")] + ',\n "entries": [\n' + ",\n".join(lines) + "\n]}\n"


def loads(data: bytes) -> tuple[Table, list[str]]:
    """The table in a file's bytes, and what was left out of it because it cannot be true.

    Raises :class:`w4a16.FormatError`: not JSON, another format or version, no key.
    """
    if len(data) > LARGEST_FILE:
        raise FormatError(f"{len(data)} bytes, expected at most {LARGEST_FILE}")
    content = parse_json(data, "the table")
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise FormatError(f'no "format": "{FORMAT}"')
    if not _is_int(content.get("version")) or content["version"] != VERSION:
        raise FormatError(f"format version {content.get('version')!r:.40}, expected {VERSION}")
    key = _key(content.get("key"))
    names = content.get("tactics")
    if not isinstance(names, list) or not all(_is_name(name) for name in names):
        raise FormatError('"tactics" is not a list of names')
    listed = content.get("entries")
    if not isinstance(listed, list):
        raise FormatError('"entries" is not a list')
    entries: dict[Case, dict[int, Times]] = {}
    dropped: list[str] = []
    for position, item in enumerate(listed):
        try:
            case = _case(item)
            if case in entries:
                raise FormatError(f"{case} stands there twice")
        except FormatError as error:
            dropped.append(f"entry {position}: {error}")
            continue
        rows: dict[int, Times] = {}
        entries[case] = rows
        for m, times in item["times"].items():
            try:
                rows.update([_row(m, times, names)])
            except FormatError as error:
                dropped.append(f"{case}: {error}")
    entries = {case: rows for case, rows in entries.items() if rows}
    return Table(key=key, entries=entries, made=_made(content.get("made"))), dropped


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_name(value: object) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST_NAME and value.isprintable()


def _key(value: object) -> Key:
    if not isinstance(value, dict):
        raise FormatError('no "key"')
    for name, wanted in _KEY_TYPES.items():
        given = value.get(name)
        good = _is_name(given) if wanted is str else _is_int(given)
        if not good:
            raise FormatError(f'"key": {name} is {given!r:.60}, expected {wanted.__name__}')
    return Key(**{name: value[name] for name in _KEY_TYPES})


def _made(value: object) -> Mapping[str, str | int | float]:
    if not isinstance(value, dict):
        return {}
    return {
        str(name)[:_LONGEST_NAME]: text[:1000] if isinstance(text, str) else text
        for name, text in list(value.items())[:64]
        if isinstance(text, (str, int)) or (isinstance(text, float) and math.isfinite(text))
    }


def _case(item: object) -> Case:
    if not isinstance(item, dict) or not isinstance(item.get("times"), dict):
        raise FormatError("not an object with times")
    label = item.get("quant_op")
    op = _QUANT_OPS.get(label) if isinstance(label, str) else None
    if op is None:
        raise FormatError(f"quant_op {label!r:.40}, expected one of {', '.join(_QUANT_OPS)}")
    sizes = [item.get(name) for name in ("group_size", "n", "k")]
    if not all(_is_int(size) for size in sizes):
        raise FormatError(f"group_size, n, k are {sizes!r:.80}, expected integers")
    group, n, k = (int(size or 0) for size in sizes)
    if not (0 < n <= _LARGEST and 0 < k <= _LARGEST and 0 <= group <= k):
        raise FormatError(f"group_size {group}, n {n}, k {k} are out of range"[:200])
    if (group == 0) != (op is QuantOp.PER_COLUMN):
        raise FormatError(f"group_size {group} with {label}")
    return Case(op, group, n, k)


def _row(m: str, times: object, names: list[str]) -> tuple[int, Times]:
    if not (m.isascii() and m.isdigit() and len(m) <= 10 and int(m) in BUCKETS):
        raise FormatError(f"M = {m:.20} is no bucket")
    if not isinstance(times, list) or not times:
        raise FormatError(f"M = {m}: no times")
    result: dict[str, float] = {}
    for pair in times:
        if not (isinstance(pair, list) and len(pair) == 2):
            raise FormatError(f"M = {m}: {pair!r:.60} is not [tactic, microseconds]")
        index, us = pair
        if not _is_int(index) or not 0 <= index < len(names):
            raise FormatError(f"M = {m}: tactic {index!r:.20} of {len(names)}")
        if isinstance(us, bool) or not isinstance(us, (int, float)) or not 0 < us < 1e9:
            raise FormatError(f"M = {m}: {names[index]} takes {us!r:.20} us")
        if names[index] in result:
            raise FormatError(f"M = {m}: {names[index]} stands there twice")
        result[names[index]] = float(us)
    return int(m), MappingProxyType(fastest(result))


# ---- Tables of this package ----


def slug(gpu: str) -> str:
    """A GPU's name as a part of a file's name."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")[:80] or "unknown"


def shipped(
    gpu: str, sm: str, sm_count: int, folder: Path | None = None
) -> tuple[Table | None, str]:
    """The table that ships for a GPU, and which one it is, or why there is none.

    That of the same model, or else of one with as many SMs of the same architecture: what fits its
    SMs fits these too, and their share of the time, apart from the memory's, is the same. With
    another number of SMs waves end elsewhere; then the library's own rule knows better.
    """
    names: list[str] = []
    similar: Table | None = None
    for path in sorted((folder or _DATA).glob("tactics-*.json")):
        try:
            table, _ = loads(path.read_bytes())
        except (OSError, FormatError) as error:
            names.append(f"{path.name}: {error}")
            continue
        if (table.key.sm, table.key.sm_count) == (sm, sm_count):
            if table.key.gpu == gpu:
                return table, f"{path.name}, measured on this model"
            similar = similar or table
        names.append(f"{table.key.gpu} ({table.key.sm_count} SMs)")
    if similar is not None:
        return similar, f"measured on {similar.key.gpu}, which has as many SMs"
    have = ", ".join(names) or "no GPU"
    return None, f"none for {gpu or 'this GPU'} ({sm_count} SMs); there is one for {have}"
