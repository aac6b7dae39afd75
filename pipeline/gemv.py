"""Select upstream's CUDA-core GEMV kernels: from its dispatchers' macros, variant by variant."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import SelectError
from pipeline.model import QUANT_OP_SHORT, Dropped, Gemv, GemvFamily, GemvKernel, QuantOp
from pipeline.profile import GemvChoice, Profile
from pipeline.releases import ReleaseFacts

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_MACRO = "INSTANTIATE_WEIGHT_ONLY_CUDA_DISPATCHERS"
_INSTANCE = re.compile(
    rf"\b{_MACRO}\s*\(\s*KernelType::(\w+)\s*,\s*(\w+)\s*,\s*(\w+)\s*,\s*(\w+)\s*,"
    r"\s*(true|false)\s*(?:,\s*(\d+)\s*)?\)\s*;"
)
_FOR_M = re.compile(r"\bDISPATCHER_FOR_M\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)\s*;")
_DISPATCHER = "kernelDispatcher.h"
#: Tile of K that the W4A16 kernels read; upstream's others are for FP8 activations.
_K_TILE = 64
#: What a family is made for: quant op and group size (0: per column).
_VARIANTS: tuple[tuple[QuantOp, int], ...] = (
    ("per_column", 0),
    ("group_scale", 64),
    ("group_scale", 128),
    ("group_scale_zero", 64),
    ("group_scale_zero", 128),
)


@dataclass(frozen=True)
class _Instance:
    kernel_type: str
    act: str
    weight: str
    layout: str
    converted: str
    k_tile: int
    origin: str
    line: int

    @property
    def details(self) -> str:
        types = f"{self.act}, {self.weight}, {self.layout}"
        return f"KernelDetails<{types}, {self.converted}, {self.k_tile}>"


def select(profile: Profile, facts: ReleaseFacts, checkout: Path) -> Gemv:
    """The families that the profile asks for, of those that the release has for this layout."""
    choice = profile.gemv
    folder = checkout / facts.gemv_folder
    if choice is None:
        return Gemv(selected=(), dropped=(), reason="the profile asks for no GEMV")
    if not folder.is_dir():
        return Gemv(selected=(), dropped=(), reason="the release has no CUDA-core GEMV")
    instances = list(_instances(folder, facts.gemv_folder))
    layout = facts.gemv_layouts.get(profile.sm)
    if layout is None:
        dropped = tuple(_dropped(i, facts.gemv_without) for i in instances)
        return Gemv(selected=(), dropped=dropped, reason=facts.gemv_without)
    reasons = {instance: _reason_to_drop(instance, layout) for instance in instances}
    kept: dict[str, _Instance] = {}
    for instance in (i for i, reason in reasons.items() if not reason):
        twin = kept.setdefault(instance.kernel_type, instance)
        if twin is not instance:
            raise SelectError(
                f"two GEMV instantiations would both be {instance.kernel_type}",
                details="\n".join(f"{i.origin}:{i.line}: {i.details}" for i in (twin, instance)),
                hint="upstream tells them apart in a way that pipeline/gemv.py does not know",
            )
    tables = _tiles(folder / _DISPATCHER)
    selected = tuple(_families(choice, profile, kept, tables))
    return Gemv(
        selected=selected,
        dropped=(
            *(_dropped(i, reason) for i, reason in reasons.items() if reason),
            *_unused_variants(choice, profile, kept, tables),
        ),
        reason="" if selected else "the profile's choice of groups and bias is empty",
    )


def _instances(folder: Path, shown: str) -> Iterable[_Instance]:
    for path in sorted(folder.glob("*.cu")):
        raw = path.read_text(encoding="utf-8", errors="replace")
        text = _COMMENT.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), raw)
        found = list(_INSTANCE.finditer(text))
        mentions = len(re.findall(rf"\b{_MACRO}\s*\(", text))
        if mentions != len(found):
            raise SelectError(
                f"{shown}/{path.name}: {mentions} GEMV instantiations, {len(found)} understood",
                details=text.strip(),
                hint="the release writes a form that pipeline/gemv.py does not know",
            )
        for match in found:
            kernel_type, act, weight, layout, converted, k_tile = match.groups()
            yield _Instance(
                kernel_type,
                act,
                weight,
                layout,
                converted,
                int(k_tile or _K_TILE),
                f"{shown}/{path.name}",
                text.count("\n", 0, match.start()) + 1,
            )


def _reason_to_drop(instance: _Instance, layout: str) -> str:
    if not instance.kernel_type.startswith("FP16Int4"):
        return f"kernel type {instance.kernel_type}, the profile wants FP16 x INT4"
    if instance.layout != layout:
        return f"layout {instance.layout} belongs to other architectures; this one's is {layout}"
    if instance.k_tile != _K_TILE:
        return f"K tile {instance.k_tile} is for FP8 activations, W4A16 uses {_K_TILE}"
    return ""


def _tiles(path: Path) -> dict[bool, tuple[GemvKernel, ...]]:
    """Upstream's CTA tile for each M, with and without zeros, from the dispatcher's macros."""
    raw = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    text = _COMMENT.sub("", raw)
    match = re.search(
        r"if\s+constexpr\s*\(\s*EnableZero\s*\)\s*\{(?P<zero>[^{}]*)\}\s*else\s*\{(?P<plain>[^{}]*)\}",
        text,
    )
    tables = {}
    for zero, group in ((True, "zero"), (False, "plain")):
        rows = _FOR_M.findall(match.group(group)) if match else []
        if not rows or any(row[0] != row[1] for row in rows):
            raise SelectError(
                f"{path.name}: the GEMV's tile table is not understood",
                hint="the release writes a form that pipeline/gemv.py does not know",
            )
        tables[zero] = tuple(
            GemvKernel(m=int(m), cta_n=int(n), threads=int(threads)) for m, _, n, threads in rows
        )
    return tables


def _families(
    choice: GemvChoice,
    profile: Profile,
    kept: dict[str, _Instance],
    tables: dict[bool, tuple[GemvKernel, ...]],
) -> Iterable[GemvFamily]:
    for quant_op, group in _VARIANTS:
        if _turned_off(choice, profile, quant_op, group):
            continue
        zero = quant_op == "group_scale_zero"
        name = _kernel_type(group)
        if name not in kept:
            raise SelectError(
                f"the release has no {name} GEMV for this architecture's layout",
                hint="turn it off under gemv in the profile",
            )
        kernels = tuple(
            kernel for kernel in tables[zero] if choice.m.first <= kernel.m <= choice.m.last
        )
        missing = {*range(choice.m.first, choice.m.last + 1)} - {kernel.m for kernel in kernels}
        if missing or len({kernel.m for kernel in kernels}) != len(kernels):
            raise SelectError(
                f"gemv.m: upstream's table has no kernel, or two, for one of M = "
                f"{', '.join(str(m) for m in sorted(missing or {k.m for k in kernels}))}",
                hint="take from: " + ", ".join(str(kernel.m) for kernel in tables[zero]),
            )
        for bias in choice.bias:
            yield GemvFamily(
                ident=_ident(quant_op, group, bias),
                quant_op=quant_op,
                group_size=group,
                zero=zero,
                bias=bias,
                details=kept[name].details,
                origin=kept[name].origin,
                kernels=kernels,
            )


def _ident(quant_op: QuantOp, group: int, bias: bool) -> str:
    shown_group = f"_g{group}" if group else ""
    return f"gemv_{QUANT_OP_SHORT[quant_op]}{shown_group}{'_bias' if bias else ''}"


def _kernel_type(group: int) -> str:
    return "FP16Int4Groupwise" if group else "FP16Int4PerChannel"


def _turned_off(choice: GemvChoice, profile: Profile, quant_op: QuantOp, group: int) -> str:
    """Why the profile has no GEMV for this quant op and group; empty when it has."""
    if quant_op not in profile.gemm.quant_ops:
        return f"quant op {quant_op} is not in gemm.quant_ops of the profile"
    if group == 0:
        return "" if choice.per_column else "gemv.per_column is off in the profile"
    if group not in choice.groups:
        return f"group {group} is not in gemv.groups of the profile"
    zero = quant_op == "group_scale_zero"
    return "" if zero in choice.zeros else f"zeros: {zero} is not in gemv.zeros of the profile"


def _unused_variants(
    choice: GemvChoice,
    profile: Profile,
    kept: dict[str, _Instance],
    tables: dict[bool, tuple[GemvKernel, ...]],
) -> Iterable[Dropped]:
    """What upstream has beside the kept variants, and why it goes."""
    for quant_op, group in _VARIANTS:
        source = kept.get(_kernel_type(group))
        off = _turned_off(choice, profile, quant_op, group)
        for bias in (False, True):
            no_bias = "" if bias in choice.bias else f"bias: {bias} is not in gemv.bias"
            if source is not None and (off or no_bias):
                yield Dropped(
                    name=f"{_kernel_type(group)} {_ident(quant_op, group, bias)}",
                    origin=source.origin,
                    line=source.line,
                    reason=off or no_bias,
                )
    for name, instance in sorted(kept.items()):
        grouped = name.endswith("Groupwise")
        groups: tuple[int, ...] = (64, 128) if grouped else (0,)
        flags = (False, True) if grouped else (False,)
        for act_scale in flags:
            for alpha in (False, True):
                if not act_scale and not alpha:
                    continue
                count = sum(len(tables[zero]) for _ in groups for zero in flags for _ in flags)
                variant = f"act_scale={act_scale}, alpha_in_advance={alpha}".lower()
                yield Dropped(
                    name=f"{name} {variant} ({count} kernels)",
                    origin=instance.origin,
                    line=instance.line,
                    reason="activation scales and an early alpha serve FP8 activations (W4A8)",
                )
        unused = [m for m in (k.m for k in tables[False]) if not _in_range(choice, m)]
        if unused:
            yield Dropped(
                name=f"{name} M = {', '.join(str(m) for m in unused)}",
                origin=instance.origin,
                line=instance.line,
                reason="M is outside the profile's gemv.m",
            )


def _in_range(choice: GemvChoice, m: int) -> bool:
    return choice.m.first <= m <= choice.m.last


def _dropped(instance: _Instance, reason: str) -> Dropped:
    name = f"{instance.kernel_type} {instance.layout} K tile {instance.k_tile}"
    return Dropped(name=name, origin=instance.origin, line=instance.line, reason=reason)
