"""Which sources are compiled together, and how many at a time: pure arithmetic on a cost model."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import PurePosixPath
from typing import Any, Literal

from pipeline.errors import ResourceError
from pipeline.model import Selection

Kind = Literal["gemm", "gemv", "wrapper", "decode", "cuda", "cxx"]
GB = 1_000_000_000

#: The bundle's object libraries whose sources may be compiled together.
UNITY_TARGETS: dict[Kind, str] = {
    "gemm": "w4a16_gemm",
    "gemv": "w4a16_gemv",
    "wrapper": "w4a16_wrappers",
}

#: The order of the bundle's targets, which is the order in which Ninja starts them.
_ORDER: dict[Kind, int] = {
    "cxx": 0,
    "cuda": 1,
    "decode": 2,
    "gemm": 3,
    "wrapper": 4,
    "gemv": 5,
}

#: A unit of its own for each source.
_ALONE: tuple[Kind, ...] = ("decode", "cuda", "cxx")


@dataclass(frozen=True, kw_only=True)
class KindCosts:
    """A unit's cost: a fixed part, a part for each device kernel, a part for each further member
    that shares one, and the same for the peak memory of its compiler processes."""

    fixed_seconds: float
    kernel_seconds: float
    sharing_seconds: float
    first_bytes: int
    """Peak with one device kernel."""
    kernel_bytes: int
    """What each further device kernel adds."""


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The cost model. Every number is a measurement on two cores, two compilations at a time,
    nvcc 13.0, or follows from one; change them here and the plans follow."""

    # One SM90 instantiation 62 s and 4.6 GB; eight with five device kernels 92 to 106 s and 8.0 to
    # 9.4 GB, with six 107 to 111 s and 9.3 to 9.7 GB; a per-column instantiation beside the
    # group-scale one of the same tile and cluster adds host code only.
    gemm: KindCosts = KindCosts(
        fixed_seconds=50,
        kernel_seconds=8,
        sharing_seconds=3,
        first_bytes=4_600_000_000,
        kernel_bytes=980_000_000,
    )
    # 63 wrappers in one unit: headers, and next to nothing each.
    wrapper: KindCosts = KindCosts(
        fixed_seconds=7,
        kernel_seconds=0.1,
        sharing_seconds=0,
        first_bytes=900_000_000,
        kernel_bytes=1_000_000,
    )
    # 3 GEMV kernels 4.6 s; 15 of them 10 to 14 s; 60 of them 25 s and 0.4 GB.
    gemv: KindCosts = KindCosts(
        fixed_seconds=3.5,
        kernel_seconds=0.5,
        sharing_seconds=0,
        first_bytes=300_000_000,
        kernel_bytes=2_000_000,
    )
    # A tactic with 6 decode kernels 2.1 to 2.9 s, with 2 of them 1.6 s.
    decode: KindCosts = KindCosts(
        fixed_seconds=1.2,
        kernel_seconds=0.2,
        sharing_seconds=0,
        first_bytes=300_000_000,
        kernel_bytes=5_000_000,
    )
    # Upstream's runner 16 s and 0.9 GB: the dearest other CUDA source seen.
    cuda: KindCosts = KindCosts(
        fixed_seconds=9,
        kernel_seconds=7,
        sharing_seconds=0,
        first_bytes=900_000_000,
        kernel_bytes=0,
    )
    cxx: KindCosts = KindCosts(
        fixed_seconds=1,
        kernel_seconds=2,
        sharing_seconds=0,
        first_bytes=300_000_000,
        kernel_bytes=0,
    )
    #: Configuring, linking both libraries and installing.
    overhead_seconds: float = 8
    #: Smaller units, of which a change compiles less again, are worth this much of the time.
    small_units_price: float = 0.02
    #: Part of the free memory, and of all memory, that compilers may fill.
    available_share: float = 0.85
    total_share: float = 0.78

    def of(self, kind: Kind) -> KindCosts:
        costs: dict[Kind, KindCosts] = {
            "gemm": self.gemm,
            "gemv": self.gemv,
            "wrapper": self.wrapper,
            "decode": self.decode,
            "cuda": self.cuda,
            "cxx": self.cxx,
        }
        return costs[kind]


COSTS = Costs()

# The miniature upstream of tests/upstream: 6 instantiations 7 s and 0.3 GB.
SMALL_COSTS = Costs(
    gemm=KindCosts(
        fixed_seconds=3,
        kernel_seconds=0.7,
        sharing_seconds=0.3,
        first_bytes=300_000_000,
        kernel_bytes=5_000_000,
    ),
    gemv=KindCosts(
        fixed_seconds=2.5,
        kernel_seconds=0.1,
        sharing_seconds=0,
        first_bytes=280_000_000,
        kernel_bytes=1_000_000,
    ),
)
_FEW_HEADERS = 200


def costs_for(bundle_files: Iterable[str]) -> Costs:
    """The cost model for a bundle: what a unit costs is mostly the headers that it includes.

    Upstream's kernels need some 480 vendored files; a bundle of few is the miniature or a toy.
    """
    vendored = sum(1 for path in bundle_files if path.startswith("third_party/"))
    return COSTS if vendored >= _FEW_HEADERS else SMALL_COSTS


@dataclass(frozen=True, kw_only=True)
class Member:
    """A source of the bundle that the library is made of."""

    path: str
    kind: Kind
    share: str = ""
    """Members with the same text share their device kernels and belong in one unit."""
    kernels: int = 1


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Sources that one compiler process takes."""

    name: str
    kind: Kind
    members: tuple[str, ...]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The units, in the order they are started, and what building them from nothing should cost."""

    units: tuple[Unit, ...]
    jobs: int
    memory_limit: int
    seconds: float
    peak_bytes: int
    """Upper bound: the ``jobs`` greediest units at once."""


def members_of(selection: Selection, bundle_files: Iterable[str]) -> tuple[Member, ...]:
    """The compiled sources among ``bundle_files`` (bundle paths), with what is known of each.

    A kernel's wrapper is the ``.cu`` file whose stem is its ``ident``.
    """
    gemm = {kernel.ident: kernel for kernel in selection.selected}
    gemv = {family.ident: family for family in selection.gemv.selected}
    decode = {tactic.ident: tactic for tactic in selection.decode.selected}
    members = []
    for text in sorted(bundle_files):
        path = PurePosixPath(text)
        if path.suffix == ".cu" and path.parent.name == "wrappers":
            members.append(Member(path=text, kind="wrapper"))
        elif path.suffix == ".cu" and path.stem in gemm:
            share = gemm[path.stem].device_kernel_key
            members.append(Member(path=text, kind="gemm", share=share))
        elif path.suffix == ".cu" and path.stem in gemv:
            count = len(gemv[path.stem].kernels)
            members.append(Member(path=text, kind="gemv", kernels=count))
        elif path.suffix == ".cu" and path.stem in decode:
            count = len(decode[path.stem].kernels)
            members.append(Member(path=text, kind="decode", kernels=count))
        elif path.suffix == ".cu":
            members.append(Member(path=text, kind="cuda"))
        elif path.suffix in (".cpp", ".cc", ".cxx", ".c"):
            members.append(Member(path=text, kind="cxx"))
    return tuple(members)


def memory_limit(available: int, total: int, asked: int | None, costs: Costs = COSTS) -> int:
    """Bytes that all compilers together may take."""
    limit = int(min(available * costs.available_share, total * costs.total_share))
    return min(limit, asked) if asked is not None else limit


def plan_units(
    members: Sequence[Member],
    *,
    cores: int,
    memory_bytes: int,
    jobs: int | None = None,
    costs: Costs = COSTS,
    previous: Plan | None = None,
) -> Plan:
    """Group ``members`` into units and choose how many to compile at a time.

    The plan with the least predicted time wins, or one a little slower with smaller units. The
    memory of the ``jobs`` greediest units never passes ``memory_bytes`` together. A ``previous``
    plan is kept as far as its sources are the same, so that a build that is there stays of use.
    The same arguments give the same plan.
    """
    atoms = _atoms(members)
    limit_jobs = max(1, min(cores, jobs) if jobs is not None else cores)
    _check_smallest(atoms, memory_bytes, costs)
    fresh = _best(atoms, limit_jobs, memory_bytes, costs)
    if previous is not None:
        kept = _kept(atoms, previous, limit_jobs, memory_bytes, costs)
        # Another machine's plan is not worth keeping at any price.
        if kept is not None and kept.seconds <= 1.5 * fresh.seconds:
            return kept
    return fresh


def plan_from_json(data: object) -> Plan | None:
    """The inverse of :func:`pipeline.model.to_json`; None for what is no plan."""
    try:
        values: Any = data
        units = tuple(
            Unit(**{**unit, "members": tuple(unit["members"])}) for unit in values["units"]
        )
        plan = Plan(**{**values, "units": units})
        return plan if all(unit.kind in _ORDER for unit in units) else None
    except (AttributeError, KeyError, TypeError):
        return None


def render_unity_plan(plan: Plan) -> str:
    """The file for the bundle's ``-DW4A16_UNITY_PLAN=FILE``: which sources share a unity source.

    It names members and groups only, in one order, so it changes only when they do.
    """
    lines = ["# Written by pipeline/plan.py: the sources that are compiled together here."]
    for kind, target in UNITY_TARGETS.items():
        units = sorted(
            (unit for unit in plan.units if unit.kind == kind and len(unit.members) > 1),
            key=lambda unit: unit.name,
        )
        if not units:
            continue
        lines.append(
            f"set_target_properties({target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_MODE GROUP)"
        )
        for unit in units:
            lines.append("set_property(SOURCE")
            lines += [f'  "{path}"' for path in unit.members]
            lines.append(f"  TARGET_DIRECTORY {target} PROPERTY UNITY_GROUP {unit.name})")
    return "\n".join(lines) + "\n"


def describe_plan(plan: Plan) -> str:
    """The plan as text, for ``--plan``."""
    rows = [("unit", "sources", "seconds", "memory")]
    rows += [
        (unit.name, str(len(unit.members)), f"{unit.seconds:.0f}", gigabytes(unit.peak_bytes))
        for unit in plan.units
    ]
    width = max(len(row[0]) for row in rows)
    lines = [f"{row[0]:<{width}}  {row[1]:>7}  {row[2]:>7}  {row[3]:>8}" for row in rows]
    lines.append(
        f"{len(plan.units)} units, {plan.jobs} at a time: about {plan.seconds:.0f} s, "
        f"at most {gigabytes(plan.peak_bytes)} of {gigabytes(plan.memory_limit)} memory"
    )
    return "\n".join(lines)


def schedule_length(seconds: Iterable[float], jobs: int) -> float:
    """When the last of the given works, started in order by ``jobs`` workers, ends."""
    workers = [0.0] * max(1, jobs)
    for length in seconds:
        heapq.heapreplace(workers, workers[0] + length)
    return max(workers)


def gigabytes(count: float) -> str:
    return f"{count / GB:.1f} GB"


# An atom is what may not be split: the members that share device kernels.
_Atom = tuple[Member, ...]


def _atoms(members: Sequence[Member]) -> list[_Atom]:
    groups: dict[tuple[str, str], list[Member]] = {}
    for member in sorted(members, key=lambda member: member.path):
        groups.setdefault((member.kind, member.share or f"={member.path}"), []).append(member)
    return [tuple(groups[key]) for key in sorted(groups)]


def _atom_seconds(atom: _Atom, costs: Costs) -> float:
    own = costs.of(atom[0].kind)
    return own.kernel_seconds * atom[0].kernels + own.sharing_seconds * (len(atom) - 1)


def _unit(name: str, atoms: Sequence[_Atom], costs: Costs) -> Unit:
    kind = atoms[0][0].kind
    own = costs.of(kind)
    kernels = sum(atom[0].kernels for atom in atoms)
    return Unit(
        name=name,
        kind=kind,
        members=tuple(sorted(member.path for atom in atoms for member in atom)),
        seconds=own.fixed_seconds + sum(_atom_seconds(atom, costs) for atom in atoms),
        peak_bytes=own.first_bytes + own.kernel_bytes * (kernels - 1),
    )


def _check_smallest(atoms: Sequence[_Atom], memory_bytes: int, costs: Costs) -> None:
    greediest = max((_unit("", [atom], costs) for atom in atoms), key=_peak, default=None)
    if greediest is not None and greediest.peak_bytes > memory_bytes:
        raise ResourceError(
            f"compiling {greediest.members[0]} alone takes {gigabytes(greediest.peak_bytes)} of "
            f"memory; {gigabytes(memory_bytes)} may be used here",
            hint="close other programs, raise --memory or the container's limit, or build on a "
            "larger machine: the bundle needs only CMake and a CUDA toolkit there",
        )


def _peak(unit: Unit) -> int:
    return unit.peak_bytes


def _balanced(kind: Kind, atoms: Sequence[_Atom], count: int, costs: Costs) -> list[Unit]:
    """``count`` units of even length: longest first into the shortest so far."""
    bins: list[tuple[float, int, list[_Atom]]] = [(0.0, index, []) for index in range(count)]
    for atom in sorted(atoms, key=lambda atom: (-_atom_seconds(atom, costs), atom[0].path)):
        filled, index, content = heapq.heappop(bins)
        content.append(atom)
        heapq.heappush(bins, (filled + _atom_seconds(atom, costs), index, content))
    contents = [content for _, _, content in sorted(bins, key=lambda item: item[1])]
    return [_unit(f"{kind}_{index:02}", content, costs) for index, content in enumerate(contents)]


def _alone(atoms: Iterable[_Atom], costs: Costs, taken: Iterable[str] = ()) -> list[Unit]:
    """A unit each, named for its file, or for its path where two files have one name."""
    atoms = list(atoms)
    names = Counter([*taken, *(PurePosixPath(atom[0].path).name for atom in atoms)])
    units = []
    for atom in atoms:
        path = PurePosixPath(atom[0].path)
        units.append(_unit(path.name if names[path.name] == 1 else str(path), [atom], costs))
    return units


def _jobs_that_fit(units: Sequence[Unit], most: int, memory_bytes: int) -> int:
    """How many units may run at once, whichever they are; 0: not even the greediest alone."""
    running = accumulate(sorted((unit.peak_bytes for unit in units), reverse=True)[:most])
    fitting = sum(1 for total in running if total <= memory_bytes)
    return max(fitting, 0 if units else 1)


def _finished(
    units: Iterable[Unit], most_jobs: int, memory_bytes: int, costs: Costs
) -> Plan | None:
    ordered = tuple(sorted(units, key=lambda unit: (_ORDER[unit.kind], -unit.seconds, unit.name)))
    jobs = _jobs_that_fit(ordered, most_jobs, memory_bytes)
    if jobs == 0:
        return None
    return Plan(
        units=ordered,
        jobs=jobs,
        memory_limit=memory_bytes,
        seconds=round(
            schedule_length((unit.seconds for unit in ordered), jobs) + costs.overhead_seconds, 1
        ),
        peak_bytes=sum(sorted((unit.peak_bytes for unit in ordered), reverse=True)[:jobs]),
    )


def _best(atoms: Sequence[_Atom], most_jobs: int, memory_bytes: int, costs: Costs) -> Plan:
    gemm = [atom for atom in atoms if atom[0].kind == "gemm"]
    gemv = [atom for atom in atoms if atom[0].kind == "gemv"]
    wrappers = [atom for atom in atoms if atom[0].kind == "wrapper"]
    rest = _alone((atom for atom in atoms if atom[0].kind in _ALONE), costs)
    # Headers are nearly all that a wrapper costs: one unit, which a change compiles in seconds.
    rest += _balanced("wrapper", wrappers, 1, costs) if wrappers else []
    candidates = []
    for gemm_count in range(1, len(gemm) + 1) if gemm else [0]:
        gemm_units = _balanced("gemm", gemm, gemm_count, costs)
        for gemv_count in range(1, len(gemv) + 1) if gemv else [0]:
            units = [*gemm_units, *_balanced("gemv", gemv, gemv_count, costs), *rest]
            plan = _finished(units, most_jobs, memory_bytes, costs)
            if plan is not None:
                candidates.append(plan)
    fastest = min(plan.seconds for plan in candidates)
    near = [plan for plan in candidates if plan.seconds <= fastest * (1 + costs.small_units_price)]
    return min(near, key=lambda plan: (_longest(plan), plan.seconds, len(plan.units)))


def _longest(plan: Plan) -> float:
    return max((unit.seconds for unit in plan.units), default=0.0)


def _kept(
    atoms: Sequence[_Atom], previous: Plan, most_jobs: int, memory_bytes: int, costs: Costs
) -> Plan | None:
    """``previous`` with the members of today; None if too little of it is left.

    A removed member leaves its unit; an added one joins the unit of its device kernel, or a new
    unit with the other added ones of its kind.
    """
    home = {path: unit for unit in previous.units for path in unit.members}
    content: dict[str, list[_Atom]] = {}
    kinds = {unit.name: unit.kind for unit in previous.units}
    added: list[_Atom] = []
    for atom in atoms:
        homes = {home[member.path].name for member in atom if member.path in home}
        if len(homes) == 1 and kinds[next(iter(homes))] == atom[0].kind:
            content.setdefault(homes.pop(), []).append(atom)
        else:
            added.append(atom)
    if not content or len(added) > max(2, len(atoms) // 8):
        return None
    units = [_unit(name, group, costs) for name, group in content.items()]
    names = {unit.name for unit in previous.units}
    for kind in UNITY_TARGETS:
        group = [atom for atom in added if atom[0].kind == kind]
        if group:
            number = next(n for n in range(len(names) + 1) if f"{kind}_{n:02}" not in names)
            units.append(_unit(f"{kind}_{number:02}", group, costs))
    units += _alone((atom for atom in added if atom[0].kind in _ALONE), costs, names)
    return _finished(units, most_jobs, memory_bytes, costs)
