"""Which kernels a library must hold: said by its manifest, not by the library itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .library import Library, Problem, QuantOp, Status, problem

FULL_PROFILE = "w4a16-sm90"
_TILES = ((64, (16, 32, 64, 128, 256)), (128, (16, 32, 64, 128, 256)))


def full_gemm_names() -> frozenset[str]:
    """The 21 tactics of TensorRT-LLM v1.0.0 for SM90."""
    names: set[str] = set()
    for tile_n, extents in _TILES:
        for tile_m in extents:
            clusters = ["1x1x1"]
            if tile_n == 128:
                clusters.append("2x1x1")
            if tile_m >= 128:
                clusters.append("1x2x1")
            if tile_n == 128 and tile_m >= 128:
                clusters.append("2x2x1")
            names.update(f"sm90:{tile_n}x{tile_m}x64:{cluster}" for cluster in clusters)
    return frozenset(names)


@dataclass(frozen=True, kw_only=True)
class Expected:
    source: str
    gemm: Mapping[str, frozenset[QuantOp]]
    gemv: Mapping[tuple[QuantOp, int, bool], frozenset[int]]
    """M by quant op, group size (0: per column) and bias."""
    decode: Mapping[str, frozenset[int]]
    """Group sizes; all of them have every quant op, and K as a group."""

    @property
    def names(self) -> frozenset[str]:
        gemv = {"gemv"} if self.gemv else set()
        return frozenset(self.gemm) | gemv | frozenset(self.decode)

    def supports(self, tactic: str, given: Problem) -> bool:
        """Whether a tactic must have a kernel for a well-formed problem with M > 0."""
        op = QuantOp(given.quant_op)
        if tactic == "gemv":
            group = 0 if op is QuantOp.PER_COLUMN else given.group_size
            offsets_fit = given.n * given.k < 2**31 and given.n // 8 <= 65535
            return offsets_fit and given.m in self.gemv.get((op, group, bool(given.has_bias)), ())
        if tactic in self.decode:
            whole = op is QuantOp.PER_COLUMN or given.group_size == given.k
            marks = tactic.split(":")[1:]
            columns, tokens = map(int, marks[0].split("x"))
            fits = bool(given.m <= 65535 * tokens and max(given.n, given.k) <= 2**30)
            if "stream" in marks:
                depth = 128 if "k128" in marks else 256
                stages = -(-given.n // columns) * -(-given.m // tokens) * -(-given.k // depth)
                fits = fits and stages < 2**31
            return fits and (whole or given.group_size in self.decode[tactic])
        if op not in self.gemm.get(tactic, ()):
            return False
        return op is QuantOp.PER_COLUMN or given.group_size % 64 == 0


def full(gemv: bool, decode: Mapping[str, frozenset[int]]) -> Expected:
    """What the default profile asks for, written out but for the decode tactics."""
    families = [(QuantOp.PER_COLUMN, 0)]
    families += [(op, g) for op in (QuantOp(1), QuantOp(2)) for g in (64, 128)]
    return Expected(
        source=f"profile {FULL_PROFILE}",
        gemm={name: frozenset(QuantOp) for name in full_gemm_names()},
        gemv={
            (op, g, bias): frozenset(range(1, 16)) for op, g in families for bias in (False, True)
        }
        if gemv
        else {},
        decode=decode,
    )


def of_manifest(manifest: Mapping[str, Any]) -> Expected:
    gemm: dict[str, set[QuantOp]] = {}
    for kernel in manifest["selected"]:
        gemm.setdefault(kernel["tactic"], set()).add(QuantOp.of(kernel["quant_op"]))
    return Expected(
        source="manifest.json",
        gemm={name: frozenset(ops) for name, ops in gemm.items()},
        gemv={
            (
                QuantOp.of(family["quant_op"]),
                int(family["group_size"]),
                bool(family["bias"]),
            ): frozenset(int(kernel["m"]) for kernel in family["kernels"])
            for family in manifest["gemv"]["selected"]
        },
        decode={
            str(tactic["name"]): frozenset(
                group
                for group in (32, 64, 128, 256)
                if any(int(kernel["group"]) <= group for kernel in tactic["kernels"])
            )
            for tactic in manifest.get("decode", {}).get("selected", ())
        },
    )


def of_library(library: Library) -> Expected:
    """The last resort, which cannot notice a missing kernel: a manifest is better."""
    gemm = {t.name: t.quant_ops for t in library.tactics if t.kind == "gemm"}
    gemv: dict[tuple[QuantOp, int, bool], frozenset[int]] = {}
    for tactic in library.tactics:
        for op in tactic.quant_ops if tactic.is_gemv else ():
            for group in (0,) if op is QuantOp.PER_COLUMN else tactic.groups:
                for bias in (False, True):
                    rows = frozenset(
                        m
                        for m in range(tactic.m_min, tactic.m_max + 1)
                        if library.status_of_supports(
                            tactic.index, problem(op, m, 4096, 4096, group, bias)
                        )
                        is Status.OK
                    )
                    if rows:
                        gemv[op, group, bias] = rows
    return Expected(
        source="the library's own list (no manifest)",
        gemm=gemm,
        gemv=gemv,
        decode=decode_of(library),
    )


def decode_of(library: Library) -> dict[str, frozenset[int]]:
    """The decode tactics that the library itself lists."""
    return {t.name: frozenset(t.groups) for t in library.tactics if t.is_decode}


def expected_of(library: Library, manifest: Mapping[str, Any] | None) -> Expected:
    if manifest is not None:
        return of_manifest(manifest)
    build = library.build()
    if build["profile"] == FULL_PROFILE:
        return full(gemv=not build["gemv_reason"], decode=decode_of(library))
    return of_library(library)
