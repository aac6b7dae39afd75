"""The products that are timed, their names, and the sets of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from benchmarks.suite.errors import UsageError

#: (N, K), the most telling first: a run that stops early has covered the widest range.
SHAPES: tuple[tuple[int, int], ...] = (
    *((8192, 28672), (4096, 4096), (28672, 4096), (10240, 8192)),
    *((4096, 14336), (6144, 4096), (57344, 8192)),
)
#: Those that ``docs/benchmarks`` has always quoted.
ANCHORS = SHAPES[:4]
ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 4096)
SHORT_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)
#: Where the short set looks at what zeros and small groups cost.
COST_ROWS = (1, 8, 16, 32, 64)
#: Where the short set begins to look at sustained clocks: at 16 rows they changed times by 3 %
#: at most.
SHORT_SUSTAINED_FROM = 32
#: From here on burst and sustained clocks differ (power), so both are measured.
SUSTAINED_FROM = 16

_NAME = re.compile(r"(\d+)x(\d+):(?:g(\d+)|column)(:zeros)?:m(\d+)", re.ASCII)
_FORM = "NxK:gGROUP:mM or NxK:column:mM, with :zeros before :m, such as 8192x28672:g128:m16"
_LARGEST = 1 << 20


@dataclass(frozen=True, order=True)
class Weight:
    """A quantised weight: N outputs, K inputs, group size (0: per column), zeros or none."""

    n: int
    k: int
    group: int
    zeros: bool = False

    @property
    def groups(self) -> int:
        return self.k // self.group if self.group else 1

    @property
    def bytes(self) -> int:
        """Of the 4-bit values, scales and zeros: what a launch must read."""
        tables = 2 if self.zeros else 1
        return self.n * self.k // 2 + tables * self.groups * self.n * 2

    @property
    def quantisation(self) -> str:
        group = f"group {self.group}" if self.group else "per column"
        return group + (", zeros" if self.zeros else "")

    def __str__(self) -> str:
        group = f"g{self.group}" if self.group else "column"
        return f"{self.n}x{self.k}:{group}" + (":zeros" if self.zeros else "")


@dataclass(frozen=True, order=True)
class Case:
    """A product of M rows with a weight. Its name is stable."""

    weight: Weight
    m: int

    @property
    def name(self) -> str:
        return f"{self.weight}:m{self.m}"

    @property
    def flops(self) -> int:
        return 2 * self.m * self.weight.n * self.weight.k

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Job:
    """A case, and how much of it is measured."""

    case: Case
    peers: bool = True
    sustained: bool = True


def parse(name: str) -> Case:
    """The case of a name; raises :class:`UsageError`."""
    found = _NAME.fullmatch(name.strip())
    if found is None:
        raise UsageError(f"{name!r} is no case: expected {_FORM}")
    n, k, group, m = (int(found[i] or 0) for i in (1, 2, 3, 5))
    if not (0 < n <= _LARGEST and 0 < k <= _LARGEST and 0 < m <= _LARGEST):
        raise UsageError(f"{name!r}: N, K and M must be from 1 to {_LARGEST}")
    if n % 8 or k % 64:
        raise UsageError(f"{name!r}: N must be a multiple of 8 and K of 64, as the kernels want it")
    if found[3] is not None and (group < 1 or k % group):
        raise UsageError(f"{name!r}: K = {k} is no multiple of the group size {group}")
    return Case(Weight(n, k, group, found[4] is not None), m)


def full() -> list[Job]:
    """Every case; group 128 without zeros first."""
    weights = [Weight(n, k, 128) for n, k in SHAPES]
    for zeros, group in ((True, 128), (False, 64), (False, 0), (True, 64), (True, 0)):
        weights += [Weight(n, k, group, zeros) for n, k in SHAPES]
    return _jobs(weights, ROWS)


def short() -> list[Job]:
    """Group 128 without zeros on every shape; zeros and group 64 where it tells most.

    The latter without peers, which were measured without zeros, and without sustained clocks.
    """
    jobs = [
        replace(job, sustained=job.case.m >= SHORT_SUSTAINED_FROM)
        for job in _jobs([Weight(n, k, 128) for n, k in SHAPES], SHORT_ROWS)
    ]
    extra = [Weight(n, k, 128, True) for n, k in ANCHORS] + [Weight(n, k, 64) for n, k in ANCHORS]
    return jobs + _jobs(extra, COST_ROWS, peers=False, sustained=False)


def named(names: Iterable[str]) -> list[Job]:
    """The cases of these names, those of a weight together."""
    cases = dict.fromkeys(parse(name) for name in names)
    weights = dict.fromkeys(case.weight for case in cases)
    return [Job(case) for weight in weights for case in sorted(cases) if case.weight == weight]


def _jobs(
    weights: Iterable[Weight], rows: Iterable[int], *, peers: bool = True, sustained: bool = True
) -> list[Job]:
    rows = tuple(rows)
    return [Job(Case(weight, m), peers, sustained) for weight in weights for m in rows]
