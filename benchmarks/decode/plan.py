"""What is checked and timed: the cases of the full run and of the quick one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from benchmarks.decode.configurations import Configuration, Narrow, Wide

SHAPES = (  # (N, K); the first four are the ones of the older tables in NOTES.md
    (4096, 4096),
    (28672, 4096),
    (10240, 8192),
    (8192, 28672),
    (6144, 4096),
    (4096, 14336),
    (57344, 8192),
)
DEPENDENCES = ("plain", "early", "late")  # enum Dependence of kernels/decode/problem.h
_PER_COLUMN = 0
_SMS = 132  # of an H200; decides only which configurations are worth timing
_SHARES = (1, 2, 3, 4, 8)

# Sizes that end within tiles and stages.
_ODD_SHAPES = (
    (4096, 4096),
    (4104, 4224),
    (4104, 4160),
    (1000, 384),
    (1000, 192),
    (264, 640),
    (72, 64),
)
_ODD_TOKENS = (1, 3, 8, 15, 16, 33, 64, 100)


@dataclass(frozen=True)
class Case:
    """One line of a plan, see bench.cu."""

    mode: str
    n: int
    k: int
    group: int
    zeros: bool
    bias: bool
    m: int
    configuration: Configuration
    shares: int
    dependence: int

    @property
    def line(self) -> str:
        return (
            f"{self.mode} {self.n} {self.k} {self.group} {self.zeros:d} {self.bias:d} {self.m} "
            f"{self.configuration.name} {self.shares} {self.dependence}"
        )


def full(configurations: Sequence[Configuration]) -> list[Case]:
    """Everything that fits; some minutes."""
    cases = list(_checks(configurations, (128, 64, 32, 256, _PER_COLUMN), (False, True), _SHARES))
    cases += _timings(configurations, SHAPES, (1, 2, 4, 8, 16, 32, 64, 128), 128, False)
    cases += _timings(configurations, SHAPES[:4], (1, 8, 16, 32, 64), 128, True)
    cases += _timings(configurations, SHAPES[:4], (1, 8, 16, 32, 64), 64, False)
    return cases


def quick() -> list[Case]:
    """The best ones of NOTES.md at group 128 without zeros, and checks of those; a minute."""
    cases: list[Case] = []
    for n, k in SHAPES:
        for m in (1, 2, 4, 8, 16, 32, 64):
            for (configuration, shares), dependence in product(_best(m, n, k), (1, 2, 0)):
                cases.append(
                    Case("time", n, k, 128, False, False, m, configuration, shares, dependence)
                )
    configurations = tuple(dict.fromkeys(case.configuration for case in cases))
    return [*_checks(configurations, (128, _PER_COLUMN), (False,), (1, 2)), *cases]


def _checks(
    configurations: Iterable[Configuration],
    groups: Iterable[int],
    zeros: Iterable[bool],
    splits: tuple[int, ...],
) -> Iterator[Case]:
    """With bias where there are zeros, so that both are met with and without."""
    configurations = tuple(configurations)
    for group_or_none, with_zeros, (n, k), m in product(groups, zeros, _ODD_SHAPES, _ODD_TOKENS):
        group = group_or_none or k
        if k % group:
            continue
        for c in configurations:
            if not _applies(c, m, group, with_zeros):
                continue
            for shares, dependence in product(splits if c.wide else (1,), (1, 2, 0)):
                yield Case("check", n, k, group, with_zeros, with_zeros, m, c, shares, dependence)


def _timings(
    configurations: Sequence[Configuration],
    shapes: Iterable[tuple[int, int]],
    tokens: Iterable[int],
    group: int,
    zeros: bool,
) -> Iterator[Case]:
    tokens = tuple(tokens)
    for (n, k), m in product(shapes, tokens):
        for c in configurations:
            if not _applies(c, m, group, zeros) or (c.tokens > 8 and m * 2 <= c.tokens):
                continue
            for shares in _SHARES if c.wide else (1,):
                if _fills(c, n, k, shares):
                    for dependence in (1, 2, 0):
                        yield Case("time", n, k, group, zeros, False, m, c, shares, dependence)


def _applies(c: Configuration, m: int, group: int, zeros: bool) -> bool:
    return c.zeros == zeros and m <= c.tokens and c.takes_group(group)


def _fills(c: Configuration, n: int, k: int, shares: int) -> bool:
    """Whether the grid leaves no more than about half of the machine idle."""
    ctas = math.ceil(n / c.rows) * shares
    room = _SMS * c.ctas_per_sm
    if not c.wide:
        return ctas / (math.ceil(ctas / room) * room) >= 0.45
    if shares > 1 and (ctas > room or k / shares < 256):
        return False
    return ctas >= room * 0.45


def _best(m: int, n: int, k: int) -> tuple[tuple[Configuration, int], ...]:
    """Configurations with their shares of K, as measured: the fastest with dependent launch, and
    without where that is another one."""
    shape = (n, k)
    if m <= 8:
        r32, r48 = Narrow(2, 1, ctas_per_sm=2), Narrow(3, 1, ctas_per_sm=2)
        few: dict[tuple[int, int], tuple[Configuration, ...]] = {
            (4096, 4096): (r32,),
            (6144, 4096): (r32, r48),
            (4096, 14336): (r32,),
            (10240, 8192): (r48, Narrow(5, 1)),
            (28672, 4096): (Narrow(7, 1, row_groups=2), Narrow(7, 1, ctas_per_sm=2)),
            (8192, 28672): (Narrow(4, 1), r32),
            (57344, 8192): (r48,),
        }
        return tuple((c, 1) for c in few[shape])
    if m <= 16:
        r32, r64, r224 = Narrow(2, 2, ctas_per_sm=2), Narrow(4, 2), Narrow(7, 2, row_groups=2)
        wide_128 = Wide(2, 1, 16, folded=True, ctas_per_sm=2)
        wide_64 = Wide(1, 2, 16, folded=True, ctas_per_sm=2)
        some: dict[tuple[int, int], tuple[Configuration, ...]] = {
            (4096, 4096): (r32,),
            (6144, 4096): (r64,),
            (4096, 14336): (r32,),
            (10240, 8192): (Narrow(5, 2),),
            (28672, 4096): (wide_128, r224),
            (8192, 28672): (r64,),
            (57344, 8192): (r224, wide_64),
        }
        return tuple((c, 1) for c in some[shape])
    tokens, folded = (32, True) if m <= 32 else (64, False)
    w64 = Wide(1, 2, tokens, folded=folded, ctas_per_sm=2)
    w64x4 = Wide(1, 4, tokens, folded=folded)
    w128 = Wide(2, 1, tokens, folded=folded, ctas_per_sm=2)
    w128x2 = Wide(2, 2, tokens, 2 if folded else 4, folded=folded)
    w192 = Wide(3, 1, tokens, 4, folded=folded)
    many: dict[tuple[int, int], tuple[tuple[Configuration, int], ...]] = {
        (4096, 4096): ((w64, 2),),
        (6144, 4096): ((w64x4, 1),),
        (4096, 14336): ((w64, 2) if folded else (w64x4, 2),),
        (10240, 8192): ((w192, 2),),
        (28672, 4096): ((w128, 1),) if folded else ((Wide(4, 1, 64, 4), 1), (w128, 1)),
        (8192, 28672): ((w128x2, 2), (w128, 2)),
        (57344, 8192): ((w128 if folded else w64, 1),),
    }
    return many[shape]
