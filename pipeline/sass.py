"""The device code in a built library, as ``cuobjdump`` shows it: resources and opcodes a kernel."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ToolchainError, VerifyError
from pipeline.model import Shape3
from pipeline.process import CommandError, Printer, run, start, stop

_INSTRUCTION_BYTES = 16


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What ``cuobjdump -res-usage`` says of a kernel."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    """Static shared memory; what a launch asks for on top is not in the binary."""
    local_bytes: int


@dataclass(frozen=True, kw_only=True)
class Code:
    """What the disassembly says of a kernel."""

    architecture: str
    code_bytes: int
    opcodes: Mapping[str, int]
    """Opcode without modifiers (``HGMMA``, ``STL``) → how often it stands in the code."""
    copies: int
    """In how many of the library's device images the kernel is: more than one wastes space."""


@dataclass(frozen=True, kw_only=True)
class DeviceKernel:
    """One device kernel of a library."""

    symbol: str
    name: str
    """The demangled symbol."""
    usage: Usage
    code: Code

    @property
    def spill_bytes(self) -> int:
        """Local memory of a thread that the code really uses, for spilled registers or arrays."""
        used = any(self.code.opcodes.get(opcode) for opcode in ("STL", "LDL"))
        return self.usage.stack_bytes + self.usage.local_bytes if used else 0


@dataclass(frozen=True, order=True)
class GemmKey:
    """What tells the GEMM device kernels apart."""

    cta: Shape3
    cluster: Shape3
    zero: bool
    weight: str = "int4"
    activation: str = "fp16"


@dataclass(frozen=True, order=True)
class GemvKey:
    """What tells the GEMV device kernels apart; group 0 is per column."""

    m: int
    cta_n: int
    threads: int
    group_size: int
    zero: bool
    bias: bool
    details: str = ""
    """Arguments of ``KernelDetails`` without namespaces or spaces."""


def read_kernels(
    library: Path, cuobjdump: Path, *, show: Printer | None = None
) -> tuple[DeviceKernel, ...]:
    """All device kernels of ``library``, sorted by their demangled name."""
    usage = _usage_of(library, cuobjdump, show)
    code = _code_of(library, cuobjdump, show)
    if set(usage) != set(code):
        odd = sorted(set(usage) ^ set(code))
        raise VerifyError(
            "cuobjdump lists kernels with resources but no code, or the other way round",
            details="\n".join(odd),
            hint="the tool may be older than the compiler: try --toolchain pypi",
        )
    names = demangle(sorted(code), show=show)
    kernels = [
        DeviceKernel(symbol=symbol, name=names[symbol], usage=usage[symbol], code=code[symbol])
        for symbol in code
    ]
    return tuple(sorted(kernels, key=lambda kernel: kernel.name))


def _usage_of(library: Path, cuobjdump: Path, show: Printer | None) -> dict[str, Usage]:
    result = run([cuobjdump, "-res-usage", library], show=show, check=False)
    if result.returncode != 0:
        if "does not contain device code" in result.stdout:
            return {}
        raise VerifyError(
            f"cuobjdump cannot read {library.name}",
            details=result.stdout,
            hint="the tool may be older than the compiler: try --toolchain pypi",
        )
    return parse_resource_usage(result.stdout.splitlines())


def _code_of(library: Path, cuobjdump: Path, show: Printer | None) -> dict[str, Code]:
    # A line at a time: the text of a whole library passes 100 MB.
    process = start([cuobjdump, "-sass", library], show=show)
    assert process.stdout is not None
    try:
        code = parse_sass(process.stdout)
        status = process.wait()
    except BaseException:
        stop(process)
        raise
    if status != 0 and code:
        raise VerifyError(f"cuobjdump stopped in the middle of {library.name}")
    return code


_FUNCTION = re.compile(r"^\s*Function\s+([^\s:]+):\s*$")
_FIGURE = re.compile(r"\b([A-Z]+)(?:\[\d+\])?:(\d+)")


def parse_resource_usage(lines: Iterable[str]) -> dict[str, Usage]:
    """Mangled kernel name → resources, from the text of ``cuobjdump -res-usage``."""
    found: dict[str, Usage] = {}
    symbol = ""
    for line in lines:
        if match := _FUNCTION.match(line):
            symbol = match[1]
        elif symbol and "REG:" in line:
            figures = {name: int(value) for name, value in _FIGURE.findall(line)}
            usage = Usage(
                registers=figures["REG"],
                stack_bytes=figures.get("STACK", 0),
                shared_bytes=figures.get("SHARED", 0),
                local_bytes=figures.get("LOCAL", 0),
            )
            found[symbol] = _worse(found[symbol], usage) if symbol in found else usage
            symbol = ""
    return found


def _worse(one: Usage, other: Usage) -> Usage:
    return Usage(
        registers=max(one.registers, other.registers),
        stack_bytes=max(one.stack_bytes, other.stack_bytes),
        shared_bytes=max(one.shared_bytes, other.shared_bytes),
        local_bytes=max(one.local_bytes, other.local_bytes),
    )


_SASS_ARCH = re.compile(r"^\s*(?:code for|\.target|arch =)\s*(sm_\w+)")
_SASS_FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)")
# "/*0010*/  @!P0 BRA 0x190 ;" and, dual issued, "/*0010*/ { FADD …"
_SASS_LINE = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(?:\{\s*)?(?:@!?\w+\s+)?([A-Z][A-Z0-9_]*)")


def parse_sass(lines: Iterable[str]) -> dict[str, Code]:
    """Mangled kernel name → code, from the text of ``cuobjdump -sass``."""
    found: dict[str, Code] = {}
    architecture = symbol = ""
    opcodes: Counter[str] = Counter()
    end = 0

    def finish() -> None:
        if not symbol:
            return
        before = found.get(symbol)
        found[symbol] = Code(
            architecture=architecture,
            code_bytes=end + (before.code_bytes if before else 0),
            opcodes=dict(sorted(opcodes.items())),
            copies=1 + (before.copies if before else 0),
        )

    for line in lines:
        if match := _SASS_LINE.match(line):
            opcodes[match[2]] += 1
            end = int(match[1], 16) + _INSTRUCTION_BYTES
        elif "Function" in line and (match := _SASS_FUNCTION.match(line)):
            finish()
            symbol, opcodes, end = match[1], Counter(), 0
        elif "sm_" in line and (match := _SASS_ARCH.match(line)):
            finish()
            architecture, symbol = match[1], ""
    finish()
    return found


def demangle(symbols: Sequence[str], *, show: Printer | None = None) -> dict[str, str]:
    """Mangled → demangled, by whichever filter of this machine can do all of them.

    CUTLASS's names are deeper than the limit that ``c++filt`` keeps by default, hence ``-r``.
    """
    if not symbols:
        return {}
    best: dict[str, str] = {}
    for name, options in (
        ("c++filt", ["-r"]),
        ("c++filt", []),
        ("llvm-cxxfilt", []),
        ("cu++filt", []),
    ):
        tool = shutil.which(name)
        if tool is None:
            continue
        try:
            output = run([tool, *options], input="\n".join(symbols) + "\n", show=show).stdout
        except CommandError:
            continue
        lines = output.splitlines()
        if len(lines) != len(symbols):
            continue
        best = dict(zip(symbols, (line.strip() for line in lines), strict=True))
        if not any(text.startswith("_Z") for text in best.values()):
            return best
    if not best:
        raise ToolchainError(
            "no c++filt to read the kernels' names with", hint="install binutils (part of gcc)"
        )
    return best


def split_arguments(text: str, start: int = 0) -> list[str]:
    """Template arguments of the first ``<`` at or after ``start``, split at the top level."""
    opening = text.find("<", start)
    if opening < 0:
        return []
    arguments: list[str] = []
    depth, begin = 0, opening + 1
    for position in range(opening, len(text)):
        character = text[position]
        if character in "<([{":
            depth += 1
        elif character in ">)]}":
            depth -= 1
            if depth == 0:
                last = text[begin:position].strip()
                return [*arguments, last] if last or arguments else []
        elif character == "," and depth == 1:
            arguments.append(text[begin:position].strip())
            begin = position + 1
    return []


_COLLECTIVE = re.compile(r"\bCollectiveMma\w*<")
_INTEGER = re.compile(r"(-?\d+)[uUlL]*\s*>*\s*$")
_GEMV = re.compile(r"\bweight_only::kernel<")
_KEY_WORDS = {"true": True, "false": False, "1": True, "0": False}


def gemm_key(name: str) -> GemmKey | None:
    """Tile, cluster and kind of a mixed-input GEMM kernel; None for any other kernel."""
    if "device_kernel<" not in name:
        return None
    for match in _COLLECTIVE.finditer(name):
        arguments = split_arguments(name, match.end() - 1)
        if len(arguments) < 5 or "MixedInput" not in arguments[0].split("<")[0]:
            continue
        policy = split_arguments(arguments[0])
        if len(policy) < 2:
            continue
        cluster, cta = _shape(policy[1]), _shape(arguments[1])
        if cluster is None or cta is None:
            continue
        # The narrow operand carries its scales, and zeros if any, in one tuple with it.
        first, second = arguments[2], arguments[4]
        narrow, wide = (first, second) if _is_tuple(first) or _bits(first) else (second, first)
        elements = split_arguments(narrow) if _is_tuple(narrow) else [narrow]
        return GemmKey(
            cta=cta,
            cluster=cluster,
            zero=len(elements) > 2,
            weight=_type_name(elements[0]),
            activation=_type_name(wide),
        )
    return None


def gemv_key(name: str) -> GemvKey | None:
    """Template arguments of a GEMV kernel; None for any other kernel.

    ``kernel<Details, M, CtaN, Threads, GroupSize, ActScale, Zero, Bias, Alpha[, TypeA]>``.
    """
    match = _GEMV.search(name)
    if match is None:
        return None
    arguments = split_arguments(name, match.end() - 1)
    if len(arguments) < 9:
        return None
    numbers = [_integer(argument) for argument in arguments[1:5]]
    flags = [_KEY_WORDS.get(argument.rpartition(")")[2]) for argument in arguments[5:9]]
    if None in numbers or None in flags or flags[0] or flags[3]:
        return None
    m, cta_n, threads, group_size = (number or 0 for number in numbers)
    return GemvKey(
        m=m,
        cta_n=cta_n,
        threads=threads,
        group_size=group_size,
        zero=bool(flags[1]),
        bias=bool(flags[2]),
        details=short_details(arguments[0]),
    )


_DECODE = re.compile(
    r"\bw4a16::decode::(?:narrow|wide|streaming|normalizing)_kernel<w4a16::decode::(\w+)>"
)


def decode_key(name: str) -> str | None:
    """What tells this project's decode kernels apart (``DecodeKernel.ident``); None for others."""
    match = _DECODE.search(name)
    return match[1] if match else None


def short_details(text: str) -> str:
    """``a::KernelDetails<a::FP16DetailsA, …, true, 64>`` without namespaces and spaces."""
    return re.sub(r"\b(?:\w+::)+|\s+", "", text)


def is_ours(name: str) -> bool:
    """Whether a kernel is one written in this project: namespace ``w4a16``."""
    return re.match(r"(?:[\w:<>]+\s+)?w4a16::", name) is not None or name.startswith("w4a16_")


def _is_tuple(text: str) -> bool:
    return text.split("<")[0].endswith("tuple")


def _bits(text: str) -> bool:
    return "integer_subbyte<" in text


def _shape(text: str) -> Shape3 | None:
    extents = [_integer(argument) for argument in split_arguments(text)]
    if len(extents) != 3 or None in extents:
        return None
    first, second, third = (extent or 0 for extent in extents)
    return first, second, third


def _integer(text: str) -> int | None:
    match = _INTEGER.search(text)
    return int(match[1]) if match else None


def _type_name(text: str) -> str:
    bare = text.replace("cutlass::", "").replace(" ", "")
    if re.fullmatch(r"integer_subbyte<(\(int\))?4,(\(bool\))?(false|true|0|1)>|u?int4b_t", bare):
        return "int4"
    return {"half_t": "fp16", "__half": "fp16", "half": "fp16"}.get(bare, bare)
