"""The values that flow between the stages: one frozen dataclass a step, JSON beside the result."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.decode import Decode

QuantOp = Literal["per_column", "group_scale", "group_scale_zero"]
QUANT_OPS: tuple[QuantOp, ...] = ("per_column", "group_scale", "group_scale_zero")
#: Short forms used in file names and C identifiers.
QUANT_OP_SHORT: dict[QuantOp, str] = {
    "per_column": "pc",
    "group_scale": "gs",
    "group_scale_zero": "gsz",
}

Shape3 = tuple[int, int, int]


def shape_text(shape: Shape3) -> str:
    return "x".join(str(extent) for extent in shape)


@dataclass(frozen=True, kw_only=True)
class Checkout:
    """One upstream repository as the run sees it: a plain folder of just the paths it needs."""

    name: str
    url: str
    ref: str
    commit: str
    folder: str
    digests: dict[str, str]
    """sha256 tree digest (:func:`pipeline.files.digest_of_files`) of each used path."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """What stage *fetch* leaves: both checkouts and the release they make."""

    release: str
    version: str
    trtllm: Checkout
    cutlass: Checkout
    matches_lock: bool | None
    """Whether the digests equal those of ``vendor/upstream.lock.yaml``; None: not locked there."""


@dataclass(frozen=True, kw_only=True)
class GeneratedTree:
    """What upstream's generator wrote: relative path → sha256."""

    folder: str
    command: list[str]
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Instantiation:
    """One explicit instantiation of the mixed-input GEMM launcher, as upstream spells it."""

    function: str
    act: str
    weight: str
    scale_zero: str
    bias: str
    out: str
    quant_op: str
    epilogue: str
    cta: Shape3
    cluster: Shape3
    mainloop: str
    epilogue_schedule: str
    origin: str
    """Generated file, relative to the generator's output folder."""
    line: int
    text: str
    """The statement as it stands, without comments, from ``template`` to ``;``."""
    include: tuple[str, ...]
    """Headers that the origin includes, in order."""
    open_scope: str
    """The lines between the includes and the first instantiation (namespaces, or macros)."""
    close_scope: str

    @property
    def arguments(self) -> str:
        """The template argument list, verbatim, without the angle brackets."""
        start = self.text.index("<") + 1
        depth = 1
        for position in range(start, len(self.text)):
            if self.text[position] == "<":
                depth += 1
            elif self.text[position] == ">":
                depth -= 1
                if depth == 0:
                    return " ".join(self.text[start:position].split())
        raise ValueError("unbalanced template argument list")


@dataclass(frozen=True, kw_only=True)
class GemmKernel:
    """A kept instantiation under the names that the library uses for it."""

    ident: str
    """C identifier and file stem, e.g. ``gemm_gs_128x64x64_2x1x1``."""
    tactic: str
    """Public name, e.g. ``sm90:128x64x64:2x1x1``."""
    quant_op: QuantOp
    instantiation: Instantiation

    @property
    def device_kernel_key(self) -> str:
        """Kernels with the same key share one device kernel: per-column and group scale differ
        in host code only."""
        zero = self.quant_op == "group_scale_zero"
        shape = f"{shape_text(self.instantiation.cta)}:{shape_text(self.instantiation.cluster)}"
        return f"{shape}:{'zero' if zero else 'scale'}"


@dataclass(frozen=True, kw_only=True)
class Dropped:
    """An instantiation or GEMV family that was not kept, and why."""

    name: str
    origin: str
    line: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class GemvKernel:
    """One kernel of a GEMV family: M rows, N columns a CTA, threads a CTA."""

    m: int
    cta_n: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class GemvFamily:
    """The GEMV kernels of one quant op, group size and bias; they share a file."""

    ident: str
    """C identifier and file stem, e.g. ``gemv_gsz_g128_bias``."""
    quant_op: QuantOp
    group_size: int
    """0 for per column."""
    zero: bool
    bias: bool
    details: str
    """C++ type, e.g. ``KernelDetails<FP16DetailsA, Int4DetailsW, …, true, 64>``."""
    origin: str
    kernels: tuple[GemvKernel, ...]


@dataclass(frozen=True, kw_only=True)
class Gemv:
    selected: tuple[GemvFamily, ...]
    dropped: tuple[Dropped, ...]
    reason: str
    """Why there is no GEMV at all; empty when there is one."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    selected: tuple[GemmKernel, ...]
    dropped: tuple[Dropped, ...]
    ignored: tuple[Dropped, ...]
    """Generated files that hold no mixed-input GEMM (grouped kernels), with the reason."""
    gemv: Gemv
    decode: Decode = field(default_factory=Decode)


@dataclass(frozen=True, kw_only=True)
class VendoredFile:
    path: str
    """Relative to the bundle."""
    origin: str
    """``trtllm:PATH`` or ``cutlass:PATH``."""
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Closure:
    """The upstream files that the kept kernels need, and the external headers stood in for."""

    files: tuple[VendoredFile, ...]
    sources: tuple[str, ...]
    """Vendored ``.cpp`` files that the library links (bundle paths)."""
    layout_check_sources: tuple[str, ...]
    """Vendored ``.cpp`` files of upstream's weight preprocessor, linked by the check only."""
    shims: tuple[str, ...]
    """Names of the stand-in headers that were asked for."""


@dataclass(frozen=True, kw_only=True)
class Bundle:
    """The rendered source tree: bundle path → sha256 of each file, and one digest over all."""

    folder: str
    digest: str
    files: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class UnitFigures:
    """What one translation unit cost."""

    name: str
    members: tuple[str, ...]
    seconds: float
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Build:
    """What stage *build* leaves."""

    install: str
    """Install tree, relative to DIR."""
    compiler: str
    flags: list[str]
    cmake: str
    jobs: int
    seconds: float
    peak_bytes: int
    units: tuple[UnitFigures, ...] = field(default=())


def to_json(value: Any) -> Any:
    """A stage's dataclass as plain JSON data."""
    return asdict(value)
