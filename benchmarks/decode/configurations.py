"""The instantiations of the kernels: parameters, names, and the units that make them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

_SHARED_BYTES = {1: 227 * 1024, 2: 113 * 1024}  # of a CTA, by how many share an SM
_MOST_STAGES = 24
_BARRIER_BYTES = 24  # of a stage: two full barriers and an empty one
_WARPS = 8  # consumers of a narrow kernel; wide ones have four for each 64 rows and set


def _stages(stage_bytes: int, ctas_per_sm: int) -> int:
    """As many as fit."""
    return min(_MOST_STAGES, (_SHARED_BYTES[ctas_per_sm] - 64) // (stage_bytes + _BARRIER_BYTES))


def _cpp(value: bool) -> str:
    return "true" if value else "false"


@dataclass(frozen=True)
class Narrow:
    """mma.sync, up to 16 tokens: NarrowShape of kernels/narrow.h."""

    row_tiles: int  # of 16 rows, of one warp
    token_tiles: int  # of 8
    group: int = 128  # 32, 64, or 128 for every larger one
    zeros: bool = False
    ctas_per_sm: int = 1
    row_groups: int = 1
    wide = False

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.row_groups

    @property
    def tokens(self) -> int:
        return 8 * self.token_tiles

    @property
    def stages(self) -> int:
        scales = 256 // self.group * self.rows * 2 * (1 + self.zeros)
        return _stages(self.rows * 128 + self.tokens * 512 + scales, self.ctas_per_sm)

    @property
    def name(self) -> str:
        return (
            f"narrow_r{16 * self.row_tiles}x{self.row_groups}_m{self.tokens}_w{_WARPS}"
            f"_s{self.stages}_g{self.group}_z{self.zeros:d}_o{self.ctas_per_sm}"
        )

    @property
    def shape(self) -> str:
        return (
            f"NarrowShape<{self.row_groups}, {self.row_tiles}, {self.token_tiles}, {_WARPS}, "
            f"{self.stages}, {self.group}, {_cpp(self.zeros)}, {self.ctas_per_sm}>"
        )

    def takes_group(self, group: int) -> bool:
        return min(group, 128) == self.group


@dataclass(frozen=True)
class Wide:
    """wgmma, more tokens: WideShape of kernels/wide.h."""

    row_groups: int  # of 64 rows
    sets: int  # of warpgroups, which take stages in turn
    tokens: int
    buffers: int = 2  # of operands in registers
    zeros: bool = False
    folded: bool = False  # scales into the FP32 sums, not into the operands
    ctas_per_sm: int = 1
    wide = True

    @property
    def rows(self) -> int:
        return 64 * self.row_groups

    @property
    def group(self) -> int:
        """The smallest that it takes."""
        return 128 if self.folded else 64

    @property
    def stages(self) -> int:
        scales = 2 * self.rows * 2 * (1 + self.zeros)
        return _stages(self.rows * 64 + self.tokens * 256 + scales, self.ctas_per_sm)

    @property
    def name(self) -> str:
        return (
            f"wide_r{self.rows}x{self.sets}_m{self.tokens}_k128_s{self.stages}_z{self.zeros:d}"
            f"_o{self.ctas_per_sm}{'_f' if self.folded else ''}_n{self.buffers}"
        )

    @property
    def shape(self) -> str:
        return (
            f"WideShape<{self.row_groups}, {self.sets}, {self.tokens}, {self.stages}, "
            f"{_cpp(self.zeros)}, {_cpp(self.folded)}, {self.buffers}, {self.ctas_per_sm}>"
        )

    def takes_group(self, group: int) -> bool:
        return group >= self.group


Configuration = Narrow | Wide


def all_configurations() -> tuple[Configuration, ...]:
    """What NOTES.md proposes to ship, and what else was best somewhere."""
    return tuple(dict.fromkeys((*_narrow(), *_wide())))


def _narrow() -> list[Configuration]:
    made: list[Configuration] = []
    for zeros, group in product((False, True), (128, 64, 32)):
        made += [Narrow(tiles, 1, group, zeros, ctas_per_sm=2) for tiles in (2, 3)]
        made += [Narrow(tiles, 1, group, zeros) for tiles in (4, 5)]
        made += [Narrow(7, 1, group, zeros, row_groups=2), Narrow(4, 2, group, zeros)]
        if group > 32:
            made += [Narrow(2, 2, group, zeros, ctas_per_sm=2), Narrow(5, 2, group, zeros)]
            made += [Narrow(7, 2, group, zeros, row_groups=2)]
    made.append(Narrow(7, 1, ctas_per_sm=2))
    return made


def _wide() -> list[Configuration]:
    made: list[Configuration] = []
    for tokens, buffers in ((16, 2), (32, 2), (64, 4)):
        for folded, zeros in ((True, False), (False, False), (False, True)):
            if folded and tokens == 64:
                continue  # twice the accumulators: no registers left
            for row_groups, sets in ((2, 2), (3, 1)):
                made.append(Wide(row_groups, sets, tokens, buffers, zeros, folded))
            for row_groups, sets in ((2, 1), (1, 2)):
                made.append(Wide(row_groups, sets, tokens, 2, zeros, folded, ctas_per_sm=2))
    made += [Wide(3, 1, 128, 4, zeros) for zeros in (False, True)]
    made += [Wide(3, 1, 128), Wide(3, 1, 32, 4, folded=True), Wide(1, 4, 32, folded=True)]
    made += [Wide(1, 4, 64), Wide(4, 1, 64, 4), Wide(4, 1, 64, zeros=True)]
    return made


def unit(configuration: Configuration) -> str:
    """The source of one instantiation."""
    c = configuration
    family = "wide" if c.wide else "narrow"
    return f"""// Generated by benchmarks/decode/configurations.py.
#include "launch.h"
#include "{family}.h"
namespace w4a16::decode {{
using Shape = {c.shape};
static_assert(Shape::shared_bytes <= {_SHARED_BYTES[c.ctas_per_sm]});
extern const Config {c.name}{{"{c.name}", Shape::rows, Shape::tokens, {c.group}, {_cpp(c.zeros)},
    {_cpp(c.wide)}, {c.ctas_per_sm}, {c.stages}, launch_shape<&{family}_kernel<Shape>, Shape>,
    reinterpret_cast<const void *>(&{family}_kernel<Shape>), Shape::shared_bytes, Shape::threads}};
}}
"""


def table(configurations: tuple[Configuration, ...]) -> str:
    """The source of the list of all instantiations."""
    names = [c.name for c in configurations]
    declared = "\n".join(f"extern const Config {name};" for name in names)
    listed = ", ".join(f"&{name}" for name in names)
    return f"""// Generated by benchmarks/decode/configurations.py.
#include "launch.h"
namespace w4a16::decode {{
{declared}
extern const Config *const configs[];
const Config *const configs[] = {{{listed}, nullptr}};
}}
"""
