"""This project's own decode kernels: what a profile asks for, as tactics and their kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from pipeline.profile import Profile
    from pipeline.releases import ReleaseFacts

#: Of the tactics' names. Each has all quant ops: per column is one group over all of K.
PREFIX = "decode:"
#: Scales go into the FP32 sums up to so many tokens; beyond, registers run out.
_MOST_FOLDED_TOKENS = 32


@dataclass(frozen=True, kw_only=True)
class DecodeKernel:
    """One device kernel of a tactic."""

    ident: str
    """C++ type that names its shape, e.g. ``decode_64x8_g64_z``."""
    group: int
    """The smallest group size that it takes: 32, 64 or 128."""
    zeros: bool
    folded: bool = False
    """Wide kernels: scales are applied to the sums, not to the operand."""
    normalizes: bool = False
    """Narrow kernels: rows of activations are normalised first."""


@dataclass(frozen=True, kw_only=True)
class DecodeTactic:
    """One configuration of the narrow (mma.sync) or the wide (wgmma) kernel."""

    kind: Literal["narrow", "wide"]
    rows: int
    """Columns of W that a CTA computes."""
    tokens: int
    """Rows of activations that a CTA computes; more of them run as blocks."""
    ctas_per_sm: int
    row_groups: int = 1
    """Narrow: warps side by side on the same part of K."""
    warps: int = 8
    """Narrow: that multiply."""
    normalizes: bool = False
    """Narrow: also by kernels that normalise the activations first."""
    sets: int = 1
    """Wide: warpgroups on the same rows, which take parts of K in turn."""
    buffers: int = 2
    """Wide: of operands in registers."""
    stage_k: int = 256
    """How much of K one copy brings."""
    cluster: int = 1
    """Wide: CTAs that share K."""
    streams: bool = False
    """Wide: all stages of all tiles are dealt out evenly (stream-K)."""

    @property
    def name(self) -> str:
        """Public and stable; ``w4a16.h`` explains it."""
        marks = [f"{self.rows}x{self.tokens}"]
        if self.kind == "wide":
            marks.append(f"s{self.sets}")
        elif self.row_groups > 1:
            marks.append(f"g{self.row_groups}")
        marks += [f"o{self.ctas_per_sm}"] if self.ctas_per_sm > 1 else []
        marks += [f"w{self.warps}"] if self.warps != 8 else []
        marks += [f"c{self.cluster}"] if self.cluster > 1 else []
        marks += [f"n{self.buffers}"] if self.buffers != 2 else []
        marks += [f"k{self.stage_k}"] if self.stage_k != 256 else []
        marks += ["stream"] if self.streams else []
        return PREFIX + ":".join(marks)

    @property
    def ident(self) -> str:
        """C identifier and file stem."""
        return self.name.replace(":", "_")

    @property
    def kernels(self) -> tuple[DecodeKernel, ...]:
        return tuple(self._kernels())

    def _kernels(self) -> Iterator[DecodeKernel]:
        groups = (32, 64, 128) if self.kind == "narrow" else (64,)
        for normalizes in (False, True) if self.normalizes else (False,):
            for group in groups:
                for zeros in (False, True):
                    marks = ("_z" if zeros else "") + ("_norm" if normalizes else "")
                    ident = f"{self.ident}_g{group}{marks}"
                    yield DecodeKernel(ident=ident, group=group, zeros=zeros, normalizes=normalizes)
        if self.kind == "wide" and self.tokens <= _MOST_FOLDED_TOKENS:
            yield DecodeKernel(ident=f"{self.ident}_g128", group=128, zeros=False, folded=True)

    def kernel_for(self, group: int, zeros: bool, normalizes: bool = False) -> DecodeKernel | None:
        """Which kernel takes groups of that size (128: and larger), if any."""
        fitting = [
            kernel
            for kernel in self.kernels
            if (kernel.zeros, kernel.normalizes) == (zeros, normalizes) and kernel.group <= group
        ]
        if self.kind == "narrow":
            fitting = [k for k in fitting if k.group == group]
        return max(fitting, key=lambda kernel: kernel.group, default=None)


@dataclass(frozen=True, kw_only=True)
class Decode:
    """What a library holds of them."""

    selected: tuple[DecodeTactic, ...] = ()
    reason: str = ""
    """Why there are none; empty when there are some."""


def select(profile: Profile, facts: ReleaseFacts) -> Decode:
    """The tactics of the profile's ``decode`` section, in its order."""
    choice = profile.decode
    if choice is None:
        return Decode(reason="the profile asks for no decode kernels")
    if facts.launcher.sm90_layout != "permuted":
        return Decode(
            reason="the decode kernels read weights as releases from 0.16 on pack them for SM90, "
            f"and this release's layout is {facts.launcher.sm90_layout}"
        )
    return Decode(
        selected=(
            *(DecodeTactic(kind="narrow", **entry.model_dump()) for entry in choice.narrow),
            *(DecodeTactic(kind="wide", **entry.model_dump()) for entry in choice.wide),
        )
    )
