"""Stage 3, select: which instantiations the profile keeps, and why each other one is dropped."""

from __future__ import annotations

import re
from pathlib import Path

from pipeline import decode, gemv
from pipeline.errors import SelectError
from pipeline.instantiation import parse_file
from pipeline.model import (
    QUANT_OP_SHORT,
    Dropped,
    GemmKernel,
    GeneratedTree,
    Instantiation,
    QuantOp,
    Selection,
    shape_text,
)
from pipeline.profile import Activation, Profile, Weight
from pipeline.releases import ReleaseFacts

_ACTIVATION: dict[Activation, str] = {
    "fp16": "half",
    "bf16": "__nv_bfloat16",
    "fp8": "__nv_fp8_e4m3",
}
_WEIGHT: dict[Weight, str] = {"int4": "cutlass::uint4b_t", "int8": "uint8_t"}
_QUANT_OP: dict[str, QuantOp] = {
    "PER_COLUMN_SCALE_ONLY": "per_column",
    "FINEGRAINED_SCALE_ONLY": "group_scale",
    "FINEGRAINED_SCALE_AND_ZEROS": "group_scale_zero",
}
#: The schedule that upstream gives a CTA tile by its first extent; others are named in the tactic.
_USUAL_SCHEDULE = {64: "pingpong", 128: "cooperative"}


def select(profile: Profile, facts: ReleaseFacts, tree: GeneratedTree, checkout: Path) -> Selection:
    """Parse all that the generator wrote and keep, one by one, what the profile asks for."""
    parsed: list[Instantiation] = []
    ignored: list[Dropped] = []
    for name in sorted(tree.files):
        try:
            text = (Path(tree.folder) / name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise SelectError(
                f"{name}: the generated file cannot be read",
                details=str(error),
                hint="the generator writes a form that pipeline/instantiation.py does not know",
            ) from error
        file = parse_file(text, origin=name, launcher=facts.launcher.function)
        parsed += file.instantiations
        if not file.instantiations:
            what = ", ".join(file.others) or "no instantiation"
            ignored.append(
                Dropped(name=name, origin=name, line=1, reason=f"no mixed-input GEMM ({what})")
            )
    kept: list[GemmKernel] = []
    dropped: list[Dropped] = []
    for instantiation in parsed:
        reason = _reason_to_drop(profile, instantiation)
        if reason:
            dropped.append(
                Dropped(
                    name=_description(instantiation),
                    origin=instantiation.origin,
                    line=instantiation.line,
                    reason=reason,
                )
            )
        else:
            kept.append(_named(instantiation))
    _require_sound(profile, kept, parsed)
    return Selection(
        selected=tuple(sorted(kept, key=lambda kernel: _order(profile, kernel))),
        dropped=tuple(dropped),
        ignored=tuple(ignored),
        gemv=gemv.select(profile, facts, checkout),
        decode=decode.select(profile, facts),
    )


def quant_op_of(instantiation: Instantiation) -> QuantOp | None:
    return _QUANT_OP.get(instantiation.quant_op.rpartition("::")[2])


def _reason_to_drop(profile: Profile, found: Instantiation) -> str:
    """Why the profile does not keep ``found``; empty when it does."""
    other = _other_types(profile, found)
    if other:
        return other
    quant_op = quant_op_of(found)
    if quant_op is None:
        return f"quant op {found.quant_op} is not known"
    if quant_op not in profile.gemm.quant_ops:
        return f"quant op {quant_op} is not in the profile"
    if not profile.wants_tile(shape_text(found.cta)):
        return f"CTA tile {shape_text(found.cta)} is not in the profile"
    if not profile.wants_cluster(shape_text(found.cluster)):
        return f"cluster {shape_text(found.cluster)} is not in the profile"
    return ""


def _other_types(profile: Profile, found: Instantiation) -> str:
    act, weight = _ACTIVATION[profile.activation], _WEIGHT[profile.weight]
    if found.act != act:
        return f"activations are {found.act}, the profile wants {act}"
    if found.weight != weight:
        return f"weights are {found.weight}, the profile wants {weight}"
    for label, value in (
        ("scales", found.scale_zero),
        ("bias", found.bias),
        ("output", found.out),
    ):
        if value != act:
            return f"{label}: {value}, the profile wants {act}"
    return ""


def _description(found: Instantiation) -> str:
    quant_op = found.quant_op.rpartition("::")[2]
    types = f"{found.act} x {found.weight} -> {found.out} (scales {found.scale_zero})"
    return f"{types} {quant_op} {shape_text(found.cta)}:{shape_text(found.cluster)}"


def _named(found: Instantiation) -> GemmKernel:
    quant_op = quant_op_of(found)
    assert quant_op is not None, "kept instantiations have a known quant op"
    cta, cluster = shape_text(found.cta), shape_text(found.cluster)
    suffix = _schedule_suffix(found)
    ident = f"gemm_{QUANT_OP_SHORT[quant_op]}_{cta}_{cluster}"
    return GemmKernel(
        ident=ident + re.sub(r"\W+", "_", suffix, flags=re.ASCII),
        tactic=f"sm90:{cta}:{cluster}{suffix}",
        quant_op=quant_op,
        instantiation=found,
    )


def _schedule_suffix(found: Instantiation) -> str:
    """Empty for the schedule that upstream always gives the tile, so that names stay stable."""
    match = re.search(r"WarpSpecialized(Pingpong|Cooperative)?", found.mainloop)
    schedule = (match.group(1) or "warpspecialized").lower() if match else found.mainloop.lower()
    return "" if schedule == _USUAL_SCHEDULE.get(found.cta[0]) else f":{schedule}"


def _order(profile: Profile, kernel: GemmKernel) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    found = kernel.instantiation
    return profile.gemm.quant_ops.index(kernel.quant_op), found.cta, found.cluster


def _require_sound(profile: Profile, kept: list[GemmKernel], parsed: list[Instantiation]) -> None:
    seen: dict[str, GemmKernel] = {}
    for kernel in kept:
        twin = seen.setdefault(kernel.ident, kernel)
        if twin is not kernel:
            places = [f"{k.instantiation.origin}:{k.instantiation.line}" for k in (twin, kernel)]
            raise SelectError(
                f"two instantiations would both be {kernel.tactic} ({kernel.quant_op})",
                details="\n".join(places),
                hint="upstream tells them apart in a way that pipeline/select.py does not know",
            )
    there = [i for i in parsed if not _other_types(profile, i)]
    for label, asked, value in (
        ("gemm.tiles", profile.gemm.tiles, lambda i: shape_text(i.cta)),
        ("gemm.clusters", profile.gemm.clusters, lambda i: shape_text(i.cluster)),
        ("gemm.quant_ops", profile.gemm.quant_ops, quant_op_of),
    ):
        found = {value(kernel.instantiation) for kernel in kept}
        missing = [] if isinstance(asked, str) else [entry for entry in asked if entry not in found]
        if missing:
            every = {str(value(i)) for i in there if quant_op_of(i) is not None}
            raise SelectError(
                f"{label}: upstream has no kernel for {', '.join(missing)} "
                "with all else that the profile asks for",
                hint=f"upstream has: {', '.join(sorted(every)) or 'none of these types'}",
            )
    if not kept:
        raise SelectError(
            f"none of {len(parsed)} instantiations is one that the profile keeps",
            hint="see gemm.quant_ops, gemm.tiles and gemm.clusters in the profile",
        )
