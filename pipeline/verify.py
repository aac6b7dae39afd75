"""Prove that the built library is what the manifest says, and within the profile's gates."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.elf import ElfFacts, read_elf, unresolved
from pipeline.errors import ToolchainError, VerifyError
from pipeline.model import QUANT_OPS, Selection, shape_text
from pipeline.process import CommandError, Printer, run
from pipeline.sass import (
    DeviceKernel,
    GemmKey,
    GemvKey,
    decode_key,
    gemm_key,
    gemv_key,
    is_ours,
    read_kernels,
    short_details,
)
from pipeline.toolchain import Toolchain

EXPORT_PREFIX = "w4a16_"
#: Without version numbers: what every Linux with a C++ runtime has.
ALLOWED_LIBRARIES = frozenset(
    {
        "libc.so",
        "libm.so",
        "libstdc++.so",
        "libgcc_s.so",
        "libdl.so",
        "libpthread.so",
        "librt.so",
        "ld-linux-x86-64.so",
        "ld-linux-aarch64.so",
    }
)


class Gates(Protocol):
    """The limits of a profile (``pipeline.profile.Gates``)."""

    @property
    def library_bytes(self) -> int: ...
    @property
    def spill_bytes(self) -> int: ...
    @property
    def gemm_sass(self) -> tuple[str, ...]: ...
    @property
    def narrow_sass(self) -> tuple[str, ...]: ...
    @property
    def wide_sass(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, kw_only=True)
class Check:
    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, kw_only=True)
class KernelFigures:
    """One device kernel of the library, for the report."""

    kernel: str
    """Readable name: ``gemm 128x64x64 2x1x1 zero``, ``gemv m4 …``, ``decode_64x8_g64``, or the
    function's own."""
    kind: str
    """``gemm``, ``gemv``, ``decode``, ``own`` or ``unknown``."""
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    """Static shared memory; a launch may ask for more."""
    code_bytes: int
    opcodes: dict[str, int]
    """How often the opcodes that a gate names, and those of spills, occur."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What stage *verify* leaves; it is written for the report whether or not all is well."""

    library: str
    library_bytes: int
    needed: tuple[str, ...]
    exported: tuple[str, ...]
    checks: tuple[Check, ...]
    kernels: tuple[KernelFigures, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def raise_if_failed(self) -> None:
        """A :class:`VerifyError` with every failed check, if there is one."""
        failed = [check for check in self.checks if not check.ok]
        if failed:
            raise VerifyError(
                f"{len(failed)} of {len(self.checks)} checks of {self.library} failed",
                details="\n".join(f"- {check.name}: {check.detail}" for check in failed),
                hint="report.md lists every check and kernel; a gate is changed in the profile, "
                "under 'gates'",
            )


def verify(
    install_dir: Path,
    selection: Selection,
    gates: Gates,
    toolchain: Toolchain,
    *,
    show: Printer | None = None,
) -> Verification:
    """Check the library below ``install_dir``. The caller stores the result and then calls
    :meth:`Verification.raise_if_failed`."""
    library = find_library(install_dir)
    if toolchain.cuobjdump is None:
        raise ToolchainError("no cuobjdump", hint="use --toolchain auto or pypi")
    facts = read_elf(library)
    kernels = read_kernels(library, toolchain.cuobjdump, show=show)
    checks = [
        *check_linkage(facts),
        *check_kernels(kernels, selection),
        *check_gates(facts, kernels, gates, selection),
        check_dispatcher(install_dir, selection, show),
    ]
    return Verification(
        library=library.relative_to(install_dir).as_posix(),
        library_bytes=facts.size,
        needed=facts.needed,
        exported=facts.exported,
        checks=tuple(checks),
        kernels=tuple(sorted(_figures(kernels, gates), key=lambda row: (row.kind, row.kernel))),
    )


def find_library(install_dir: Path) -> Path:
    """The shared library of an install tree: the file, not one of the links to it."""
    found = sorted(
        path
        for folder in ("lib", "lib64", "lib/*-linux-gnu")
        for path in install_dir.glob(f"{folder}/libw4a16.so*")
        if path.is_file() and not path.is_symlink()
    )
    if len(found) != 1:
        raise VerifyError(
            f"{install_dir} holds {len(found)} shared libraries libw4a16.so, not one",
            hint="run the build stage again; the profile must have 'shared: true'",
        )
    return found[0]


# --- linkage -------------------------------------------------------------------------------------


def check_linkage(facts: ElfFacts) -> Iterator[Check]:
    yield _empty("no undefined symbol", unresolved(facts), "none", "no needed library has")
    foreign = [name for name in facts.exported if not name.startswith(EXPORT_PREFIX)]
    good = f"{len(facts.exported)} symbols"
    yield _empty(f"exports {EXPORT_PREFIX}* only", foreign, good, "exported besides")
    if not facts.exported:
        yield Check(name="exports something", ok=False, detail="no symbol is exported")
    extra = [name for name in facts.needed if _bare(name) not in ALLOWED_LIBRARIES]
    yield _empty("needs system libraries only", extra, ", ".join(facts.needed), "needs")
    # Symbols of the driver are resolved at run time: a link to one would need libcuda to load.
    driver = [name.name for name in facts.undefined if _is_driver(name.name)]
    yield _empty("no driver symbol linked", driver, "none", "linked")
    yield Check(
        name="stripped",
        ok=facts.stripped,
        detail="no symbol table" if facts.stripped else "has a symbol table",
    )
    yield Check(
        name="no run path",
        ok=not facts.runpath,
        detail=facts.runpath or "none",
    )


def _bare(library: str) -> str:
    """``libc.so.6`` → ``libc.so``."""
    head, dot, _ = library.partition(".so")
    return head + dot


def _is_driver(symbol: str) -> bool:
    return symbol.startswith("cu") and len(symbol) > 2 and symbol[2].isupper()


# --- kernels -------------------------------------------------------------------------------------


def expected_gemm(selection: Selection) -> dict[GemmKey, list[str]]:
    """Device kernel → tactics and quant ops that launch it."""
    found: dict[GemmKey, list[str]] = {}
    for kernel in selection.selected:
        key = GemmKey(
            cta=kernel.instantiation.cta,
            cluster=kernel.instantiation.cluster,
            zero=kernel.quant_op == "group_scale_zero",
        )
        found.setdefault(key, []).append(f"{kernel.tactic} {kernel.quant_op}")
    return found


def expected_gemv(selection: Selection) -> dict[GemvKey, list[str]]:
    found: dict[GemvKey, list[str]] = {}
    for family in selection.gemv.selected:
        for kernel in family.kernels:
            key = GemvKey(
                m=kernel.m,
                cta_n=kernel.cta_n,
                threads=kernel.threads,
                group_size=family.group_size,
                zero=family.zero,
                bias=family.bias,
                details=short_details(family.details),
            )
            found.setdefault(key, []).append(f"{family.ident} m{kernel.m}")
    return found


def expected_decode(selection: Selection) -> dict[str, str]:
    """Device kernel (:func:`pipeline.sass.decode_key`) → tactic."""
    return {
        kernel.ident: tactic.name
        for tactic in selection.decode.selected
        for kernel in tactic.kernels
    }


def check_kernels(kernels: Sequence[DeviceKernel], selection: Selection) -> Iterator[Check]:
    """Both ways: what is selected is in the binary, and nothing else is."""
    gemm_wanted, gemv_wanted = expected_gemm(selection), expected_gemv(selection)
    decode_wanted = expected_decode(selection)
    gemm_found: Counter[GemmKey] = Counter()
    gemv_found: Counter[GemvKey] = Counter()
    decode_found: Counter[str] = Counter()
    strangers = []
    for kernel in kernels:
        gemm, gemv = gemm_key(kernel.name), gemv_key(kernel.name)
        decode = decode_key(kernel.name)
        if gemm is not None and gemm in gemm_wanted:
            gemm_found[gemm] += 1
        elif gemv is not None and gemv in gemv_wanted:
            gemv_found[gemv] += 1
        elif decode is not None and decode in decode_wanted:
            decode_found[decode] += 1
        elif decode is not None or not is_ours(kernel.name):
            strangers.append(readable(kernel))
    missing = [
        name for key, names in gemm_wanted.items() if key not in gemm_found for name in names
    ]
    yield _empty(
        "each GEMM tactic and quant op has its device kernel",
        missing,
        f"{len(selection.selected)} by {len(gemm_found)} device kernels",
        "missing",
    )
    missing = [
        name for key, names in gemv_wanted.items() if key not in gemv_found for name in names
    ]
    yield _empty(
        "each GEMV kernel is there",
        missing,
        f"{len(gemv_found)}" if gemv_wanted else f"none selected: {selection.gemv.reason}",
        "missing",
    )
    missing = [
        f"{tactic} {ident}" for ident, tactic in decode_wanted.items() if ident not in decode_found
    ]
    count = len(selection.decode.selected)
    yield _empty(
        "each decode tactic has its device kernels",
        missing,
        f"{count} by {len(decode_found)} device kernels"
        if decode_wanted
        else f"none selected: {selection.decode.reason}",
        "missing",
    )
    own = sum(is_ours(kernel.name) for kernel in kernels)
    yield _empty(
        "each kernel in the library belongs to a tactic",
        strangers,
        f"{len(kernels)} kernels, {own} of them this project's own",
        "not selected",
    )
    # Two instantiations under one key would mean that the key does not tell kernels apart.
    double = [f"{_key_text(gemm)} ({count})" for gemm, count in gemm_found.items() if count > 1]
    double += [f"{_key_text(gemv)} ({count})" for gemv, count in gemv_found.items() if count > 1]
    yield _empty("no kernel has a second variant", double, "none", "variants of")
    # Costs size only: units that share a device kernel were compiled apart.
    copies = [readable(kernel) for kernel in kernels if kernel.code.copies > 1]
    detail = "each is in one device image" if not copies else "stored twice: " + ", ".join(copies)
    yield Check(name="copies of kernels (for information)", ok=True, detail=detail)


def check_gates(
    facts: ElfFacts, kernels: Sequence[DeviceKernel], gates: Gates, selection: Selection
) -> Iterator[Check]:
    gemm = [kernel for kernel in kernels if gemm_key(kernel.name) is not None]
    for opcode in gates.gemm_sass:
        lacking = [readable(kernel) for kernel in gemm if not kernel.code.opcodes.get(opcode)]
        good = f"in all {len(gemm)}"
        yield _empty(f"SASS of every GEMM kernel has {opcode}", lacking, good, "not in")
    kinds = {
        kernel.ident: tactic.kind
        for tactic in selection.decode.selected
        for kernel in tactic.kernels
    }
    for kind, opcodes in (("narrow", gates.narrow_sass), ("wide", gates.wide_sass)):
        decode = [k for k in kernels if kinds.get(decode_key(k.name) or "") == kind]
        for opcode in opcodes if decode else ():
            lacking = [readable(kernel) for kernel in decode if not kernel.code.opcodes.get(opcode)]
            name = f"SASS of every {kind} decode kernel has {opcode}"
            yield _empty(name, lacking, f"in all {len(decode)}", "not in")
        if kind == "wide" and decode:
            serial = [readable(kernel) for kernel in decode if _waits_for_each_wgmma(kernel)]
            name = "wgmmas of every wide decode kernel overlap with other work"
            yield _empty(name, serial, f"in all {len(decode)}", "ptxas serialised them in")
    spilling = [
        f"{readable(kernel)} ({kernel.spill_bytes} B)"
        for kernel in kernels
        if kernel.spill_bytes > gates.spill_bytes
    ]
    yield _empty(f"spills at most {gates.spill_bytes} B a thread", spilling, "none over", "over")
    yield Check(
        name=f"library at most {gates.library_bytes} B",
        ok=facts.size <= gates.library_bytes,
        detail=f"{facts.size} B",
    )


def _waits_for_each_wgmma(kernel: DeviceKernel) -> bool:
    """Whether ptxas put a wait behind each one (its remarks C7510 to C7519): one arrival and one
    wait then surround every HGMMA, and otherwise at least two HGMMAs share such a pair."""
    opcodes = kernel.code.opcodes
    return 2 * opcodes.get("WARPGROUP", 0) > 3 * opcodes.get("HGMMA", 0)


# --- the dispatcher ------------------------------------------------------------------------------


def check_dispatcher(install_dir: Path, selection: Selection, show: Printer | None) -> Check:
    """The library's own list of tactics, asked of ``w4a16_info --json``, equals the selection."""
    name = "the dispatcher's list is the selection"
    program = install_dir / "bin" / "w4a16_info"
    if not program.is_file():
        return Check(name=name, ok=False, detail="the install tree has no bin/w4a16_info")
    try:
        output = run([program, "--json"], show=show, timeout=60, separate_stderr=True).stdout
        listed = dispatched(json.loads(output))
    except (CommandError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{error.what}\n{error.output}" if isinstance(error, CommandError) else repr(error)
        return Check(name=name, ok=False, detail=f"w4a16_info --json: {reason.strip()}")
    wanted = {(kernel.tactic, kernel.quant_op) for kernel in selection.selected}
    wanted |= {("gemv", family.quant_op) for family in selection.gemv.selected}
    wanted |= {(tactic.name, op) for tactic in selection.decode.selected for op in QUANT_OPS}
    missing = sorted(f"{tactic} {op}" for tactic, op in wanted - listed)
    extra = sorted(f"{tactic} {op}" for tactic, op in listed - wanted)
    problems = [f"not listed: {text}" for text in missing] + [f"not selected: {t}" for t in extra]
    return _empty(name, problems, f"{len(listed)} pairs of tactic and quant op", "")


def dispatched(info: Mapping[str, Any]) -> set[tuple[str, str]]:
    """(tactic, quant op) pairs of ``w4a16_info --json``: ``tactics: [{name, quant_ops: []}]``."""
    pairs = {
        (str(tactic["name"]), str(op)) for tactic in info["tactics"] for op in tactic["quant_ops"]
    }
    unknown = {op for _, op in pairs} - set(QUANT_OPS)
    if unknown:
        raise ValueError(f"unknown quant ops {sorted(unknown)}")
    return pairs


# --- for people ----------------------------------------------------------------------------------


def readable(kernel: DeviceKernel) -> str:
    """A short name that tells the kernel apart."""
    gemm = gemm_key(kernel.name)
    if gemm is not None:
        return _key_text(gemm)
    gemv = gemv_key(kernel.name)
    if gemv is not None:
        return _key_text(gemv)
    return decode_key(kernel.name) or _function(kernel.name)


def _key_text(key: GemmKey | GemvKey) -> str:
    if isinstance(key, GemmKey):
        types = (
            ""
            if (key.weight, key.activation) == ("int4", "fp16")
            else (f" {key.activation}x{key.weight}")
        )
        zero = " zero" if key.zero else ""
        return f"gemm {shape_text(key.cta)} {shape_text(key.cluster)}{zero}{types}"
    group = f"g{key.group_size}" if key.group_size else "per column"
    flags = (" zero" if key.zero else "") + (" bias" if key.bias else "")
    return f"gemv m{key.m:02} n{key.cta_n} t{key.threads} {group}{flags}"


def _function(name: str) -> str:
    """A demangled signature without its parameters, cut to a readable length."""
    head = name.removeprefix("void ").replace("(anonymous namespace)", "{anonymous}")
    head = head.partition("(")[0]
    return head if len(head) <= 160 else head[:157] + "..."


def _figures(kernels: Iterable[DeviceKernel], gates: Gates) -> Iterator[KernelFigures]:
    named = (*gates.gemm_sass, *gates.narrow_sass, *gates.wide_sass, "STL", "LDL")
    shown = tuple(dict.fromkeys(named))
    for kernel in kernels:
        yield KernelFigures(
            kernel=readable(kernel),
            kind=_kind(kernel.name),
            registers=kernel.usage.registers,
            spill_bytes=kernel.spill_bytes,
            stack_bytes=kernel.usage.stack_bytes,
            shared_bytes=kernel.usage.shared_bytes,
            code_bytes=kernel.code.code_bytes,
            opcodes={name: count for name in shown if (count := kernel.code.opcodes.get(name, 0))},
        )


def _kind(name: str) -> str:
    if gemm_key(name) is not None:
        return "gemm"
    if gemv_key(name) is not None:
        return "gemv"
    if decode_key(name) is not None:
        return "decode"
    return "own" if is_ours(name) else "unknown"


def _empty(name: str, problems: Sequence[str], good: str, prefix: str) -> Check:
    """A check that is well if ``problems`` is empty."""
    if not problems:
        return Check(name=name, ok=True, detail=good)
    listed = ", ".join(problems)
    return Check(name=name, ok=False, detail=f"{prefix} {listed}".strip())
