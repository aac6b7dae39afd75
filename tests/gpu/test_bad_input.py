"""Every wrong argument gets its status and a message that names it; most of it needs no GPU.

Arguments are checked before the device is asked about, so the addresses here lead nowhere.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from .library import (
    AUTO,
    RUN_OVERLAP,
    ApiError,
    Args,
    Build,
    Device,
    Library,
    PackArgs,
    Problem,
    QuantOp,
    Source,
    Status,
    TacticInfo,
    Versioned,
    pack_args,
    problem,
)

INVALID = Status.ERROR_INVALID_ARGUMENT
UNSUPPORTED = Status.ERROR_UNSUPPORTED
MISALIGNED = Status.ERROR_MISALIGNED
UNKNOWN = Status.ERROR_UNKNOWN_TACTIC
#: Aligned, and no address of anything.
NOWHERE = 0x7000_0000_0000
PER_COLUMN, GROUP_SCALE, GROUP_SCALE_ZERO = QuantOp


@dataclass
class Call:
    """The arguments of one launch, right until a case spoils one."""

    tactic: int
    given: Problem
    args: Args

    @classmethod
    def good(
        cls, op: QuantOp, tactic: int = AUTO, *, m: int = 4, group: int = 64, bias: bool = True
    ) -> Call:
        """Well-formed; whether there is a kernel for it is another question."""
        given = problem(op, m, 256, 256, 0 if op is PER_COLUMN else group, bias)
        pointers = {
            name: NOWHERE + place * 0x1000_0000
            for place, name in enumerate(("a", "b", "scales", "c", "workspace"))
        }
        return cls(
            tactic=tactic,
            given=given,
            args=Args(
                problem=ctypes.pointer(given),
                zeros=NOWHERE + 0x8000_0000 if op is GROUP_SCALE_ZERO else None,
                bias=NOWHERE + 0x9000_0000 if bias else None,
                workspace_bytes=1 << 40,
                **pointers,
            ),
        )


def accepted(library: Library, op: QuantOp, tactic: int = AUTO, **wanted: bool) -> Call | None:
    """A call that the library has a kernel for."""
    for bias in (wanted["bias"],) if "bias" in wanted else (True, False):
        for group in (64, 128, 256):
            for m in (4, 1):
                call = Call.good(op, tactic, m=m, group=group, bias=bias)
                if library.status_of_supports(tactic, call.given) is Status.OK:
                    return call
    return None


def accepted_calls(library: Library, *, by_tactic: bool = False, **wanted: bool) -> list[Call]:
    """One for each quant op through AUTO, or also through each tactic that has it."""
    calls = [accepted(library, op, **wanted) for op in ops_of(library)]
    if by_tactic:
        calls += [
            accepted(library, op, tactic.index, **wanted)
            for tactic in library.tactics
            for op in tactic.quant_ops
        ]
    return [call for call in calls if call is not None]


def refusal(library: Library, function: str, *arguments: Any) -> tuple[Status, str]:
    status = Status(library.raw(function, *arguments))
    return status, library.last_error()


def run(library: Library, call: Call) -> tuple[Status, str]:
    return refusal(library, "run", call.tactic, ctypes.byref(call.args), None)


def check(
    found: tuple[Status, str], wanted: Status | Sequence[Status], names: str, what: str = ""
) -> None:
    """``names`` is a regular expression for how the message calls the argument."""
    status, message = found
    allowed = [wanted] if isinstance(wanted, Status) else list(wanted)
    assert status in allowed, f"{what}: {status.name}: {message}"
    assert re.search(names, message), f"{what}: {message!r} does not name {names}"


@dataclass(frozen=True)
class Spoiled:
    """A way to break a problem that is otherwise right."""

    name: str
    change: Callable[[Problem], object]
    status: tuple[Status, ...]
    names: str
    ops: tuple[QuantOp, ...] = tuple(QuantOp)


def put(member: str, value: int) -> Callable[[Problem], None]:
    def change(given: Problem) -> None:
        setattr(given, member, value)

    return change


GROUPED = (GROUP_SCALE, GROUP_SCALE_ZERO)
PROBLEMS = [
    Spoiled("struct_size 0", put("struct_size", 0), (INVALID,), "struct_size"),
    Spoiled("struct_size short", put("struct_size", 44), (INVALID,), "struct_size"),
    Spoiled("struct_size absurd", put("struct_size", 2**32 - 1), (INVALID,), "struct_size"),
    Spoiled("quant_op -1", put("quant_op", -1), (INVALID,), "quant_op"),
    Spoiled("quant_op 3", put("quant_op", 3), (INVALID,), "quant_op"),
    Spoiled("quant_op huge", put("quant_op", 2**31 - 1), (INVALID,), "quant_op"),
    Spoiled("has_bias 2", put("has_bias", 2), (INVALID,), "has_bias"),
    Spoiled("has_bias -1", put("has_bias", -1), (INVALID,), "has_bias"),
    Spoiled("reserved", put("reserved", 1), (INVALID,), "reserved"),
    Spoiled("M -1", put("m", -1), (INVALID,), r"\bM\b"),
    Spoiled("M least", put("m", -(2**63)), (INVALID,), r"\bM\b"),
    Spoiled("M 2**31", put("m", 2**31), (INVALID,), r"\bM\b"),
    Spoiled("M 2**32 + 1", put("m", 2**32 + 1), (INVALID,), r"\bM\b"),
    Spoiled("M greatest", put("m", 2**63 - 1), (INVALID,), r"\bM\b"),
    Spoiled("N 0", put("n", 0), (INVALID,), r"\bN\b"),
    Spoiled("N -8", put("n", -8), (INVALID,), r"\bN\b"),
    Spoiled("N 4", put("n", 4), (INVALID,), r"\bN\b"),
    Spoiled("N 257", put("n", 257), (INVALID,), r"\bN\b"),
    Spoiled("N 2**31", put("n", 2**31), (INVALID,), r"\bN\b"),
    Spoiled("N 2**32 + 256", put("n", 2**32 + 256), (INVALID,), r"\bN\b"),
    Spoiled("N 2**62", put("n", 2**62), (INVALID,), r"\bN\b"),
    Spoiled("K 0", put("k", 0), (INVALID,), r"\bK\b"),
    Spoiled("K -64", put("k", -64), (INVALID,), r"\bK\b"),
    Spoiled("K 32", put("k", 32), (INVALID,), r"\bK\b"),
    Spoiled("K 257", put("k", 257), (INVALID,), r"\bK\b"),
    Spoiled("K 2**31", put("k", 2**31), (INVALID,), r"\bK\b"),
    Spoiled("K 2**32 + 256", put("k", 2**32 + 256), (INVALID,), r"\bK\b"),
    Spoiled("K 2**62", put("k", 2**62), (INVALID,), r"\bK\b"),
    Spoiled("group 64", put("group_size", 64), (INVALID,), "group", (PER_COLUMN,)),
    Spoiled("group -1", put("group_size", -1), (INVALID,), "group"),
    Spoiled("group 0", put("group_size", 0), (INVALID,), "group", GROUPED),
    Spoiled("group -64", put("group_size", -64), (INVALID,), "group", GROUPED),
    Spoiled("group 63", put("group_size", 63), (INVALID, UNSUPPORTED), "group", GROUPED),
    Spoiled("group 16", put("group_size", 16), (INVALID, UNSUPPORTED), "group", GROUPED),
    Spoiled("group 192", put("group_size", 192), (INVALID,), "group", GROUPED),
    Spoiled("group 512", put("group_size", 512), (INVALID,), "group", GROUPED),
    Spoiled("group 2**32 + 64", put("group_size", 2**32 + 64), (INVALID,), "group"),
    Spoiled("group 2**62", put("group_size", 2**62), (INVALID,), "group"),
]


def ops_of(library: Library) -> list[QuantOp]:
    return sorted({op for tactic in library.tactics for op in tactic.quant_ops})


@pytest.mark.parametrize("case", PROBLEMS, ids=lambda case: case.name)
def test_a_wrong_problem_is_refused_by_every_function_that_takes_one(
    library: Library, case: Spoiled
) -> None:
    for op in ops_of(library):
        if op not in case.ops:
            continue
        for tactic in (AUTO, *(t.index for t in library.tactics if not t.is_gemv)):
            call = Call.good(op, tactic)
            case.change(call.given)
            size, index = ctypes.c_size_t(77), ctypes.c_int32(77)
            given = ctypes.byref(call.given)
            check(run(library, call), case.status, case.names, f"run {op.label}")
            found = refusal(library, "supports", tactic, given)
            check(found, case.status, case.names, "supports")
            found = refusal(library, "workspace_size", tactic, given, ctypes.byref(size))
            check(found, case.status, case.names, "workspace_size")
            if tactic == AUTO:
                found = refusal(library, "auto_tactic", given, ctypes.byref(index))
                check(found, case.status, case.names, "auto_tactic")


def test_right_arguments_get_as_far_as_the_device(library: Library) -> None:
    """The cases here fail for what they spoil, not for something else."""
    try:
        library.check_device()
    except ApiError as error:
        wanted = error.status
    else:
        pytest.skip("with a GPU these would be launched on addresses that lead nowhere")
    calls = accepted_calls(library, by_tactic=True)
    assert len(calls) >= len(library.tactics)
    for call in calls:
        status, message = run(library, call)
        assert status is wanted, message


@pytest.mark.parametrize("member", ["a", "b", "scales", "c"])
def test_a_missing_pointer_is_refused(library: Library, member: str) -> None:
    for call in accepted_calls(library):
        setattr(call.args, member, None)
        check(run(library, call), INVALID, rf"\b{member}\b")


def test_bias_must_be_there_exactly_if_the_problem_has_one(library: Library) -> None:
    for call in accepted_calls(library, bias=True):
        call.args.bias = None
        check(run(library, call), INVALID, r"\bbias\b")
    for call in accepted_calls(library, bias=False):
        call.args.bias = NOWHERE
        check(run(library, call), INVALID, r"\bbias\b")


def test_zeros_must_be_there_exactly_if_the_quant_op_has_them(library: Library) -> None:
    for call in accepted_calls(library):
        call.args.zeros = NOWHERE if call.args.zeros is None else None
        check(run(library, call), INVALID, r"\bzeros\b")


@pytest.mark.parametrize("shift", [1, 2, 4, 8])
@pytest.mark.parametrize("member", ["a", "b", "scales", "zeros", "bias", "c", "workspace"])
def test_a_pointer_that_is_not_aligned_to_16_bytes_is_refused(
    library: Library, member: str, shift: int
) -> None:
    for call in accepted_calls(library, by_tactic=True):
        if getattr(call.args, member) is None:
            continue  # these have no zeros, or no bias
        setattr(call.args, member, getattr(call.args, member) + shift)
        check(run(library, call), MISALIGNED, rf"\b{member}\b")


def test_missing_structs_and_outputs_are_refused(library: Library) -> None:
    given = problem(ops_of(library)[0], 4, 256, 256, 0 if PER_COLUMN in ops_of(library) else 64)
    here = ctypes.byref(given)
    check(refusal(library, "run", AUTO, None, None), INVALID, "args")
    check(refusal(library, "run_named", b"auto", None, None), INVALID, "args")
    check(refusal(library, "supports", AUTO, None), INVALID, "problem")
    check(refusal(library, "auto_tactic", None, None), INVALID, "problem")
    check(refusal(library, "auto_tactic", here, None), INVALID, "tactic")
    check(refusal(library, "workspace_size", AUTO, here, None), INVALID, "bytes")
    check(refusal(library, "tactic", 0, None), INVALID, "info")
    check(refusal(library, "build_info", None), INVALID, "info")
    check(refusal(library, "find_tactic", None, ctypes.byref(ctypes.c_int32())), INVALID, "name")
    check(refusal(library, "find_tactic", b"auto", None), INVALID, "index")
    call = Call.good(ops_of(library)[0])
    call.args.problem = None
    check(run(library, call), INVALID, "problem")
    name = refusal(library, "run_named", None, ctypes.byref(call.args), None)
    check(name, INVALID, "name|tactic")


def test_launch_arguments_of_another_size_or_with_unknown_flags_are_refused(
    library: Library,
) -> None:
    op = ops_of(library)[0]
    for size in (0, 1, ctypes.sizeof(Args) - 8, 2**32 - 1):
        call = Call.good(op)
        call.args.struct_size = size
        check(run(library, call), INVALID, "struct_size")
    for flags in (2, RUN_OVERLAP | 2, 2**31, 2**32 - 1):
        call = Call.good(op)
        call.args.flags = flags
        check(run(library, call), INVALID, rf"flags is {flags}")


def test_a_later_and_longer_struct_is_accepted_only_if_its_new_members_are_zero(
    library: Library,
) -> None:
    op = ops_of(library)[0]
    length = ctypes.sizeof(Problem)
    for extra, status in ((b"\0" * 16, Status.OK), (b"\0" * 15 + b"\1", INVALID)):
        given = Call.good(op).given
        given.struct_size = length + 16
        longer = ctypes.create_string_buffer(bytes(given) + extra, length + 16)
        assert refusal(library, "supports", AUTO, longer)[0] is status


@pytest.mark.parametrize("kind", [Build, Device, TacticInfo], ids=lambda kind: kind.__name__)
def test_an_output_struct_of_the_wrong_size_is_refused_and_left_alone(
    library: Library, kind: type[Versioned]
) -> None:
    length = ctypes.sizeof(kind)
    for size in (0, 4, length - 4):
        info = kind()
        info.struct_size = size
        before = bytes(info)
        arguments = {Build: (), Device: (-1,), TacticInfo: (0,)}[kind]
        function = {Build: "build_info", Device: "check_device", TacticInfo: "tactic"}[kind]
        found = refusal(library, function, *arguments, ctypes.byref(info))
        check(found, INVALID, "struct_size")
        assert bytes(info) == before


def test_a_longer_output_struct_is_filled_no_further_than_this_version_knows(
    library: Library,
) -> None:
    length = ctypes.sizeof(TacticInfo)
    room = ctypes.create_string_buffer(b"\xa5" * (length + 64), length + 64)
    ctypes.c_uint32.from_buffer(room).value = length + 64
    assert library.raw("tactic", 0, room) == Status.OK
    assert room.raw[length:] == b"\xa5" * 64
    assert TacticInfo.from_buffer(room).name.decode() == library.tactics[0].name


def test_an_unknown_tactic_is_refused(library: Library) -> None:
    op = ops_of(library)[0]
    for index in (len(library.tactics), 2**31 - 1, -2, -(2**31)):
        call = Call.good(op, index)
        check(run(library, call), UNKNOWN, "tactic")
        found = refusal(library, "supports", index, ctypes.byref(call.given))
        check(found, UNKNOWN, "tactic")
        size = ctypes.c_size_t()
        here = ctypes.byref(call.given)
        found = refusal(library, "workspace_size", index, here, ctypes.byref(size))
        check(found, UNKNOWN, "tactic")
        info = TacticInfo()
        check(refusal(library, "tactic", index, ctypes.byref(info)), UNKNOWN, "tactic")
    info = TacticInfo()
    check(refusal(library, "tactic", AUTO, ctypes.byref(info)), UNKNOWN, "tactic")


@pytest.mark.parametrize(
    "name", [b"", b"sm90:1x2x3:1x1x1", b"GEMV", b"gemv ", b"a" * 5000, b"%n%s"]
)
def test_an_unknown_tactic_name_is_refused_and_quoted(library: Library, name: bytes) -> None:
    index = ctypes.c_int32(77)
    shown = re.escape(name.decode()[:40])
    check(refusal(library, "find_tactic", name, ctypes.byref(index)), UNKNOWN, shown)
    args = ctypes.byref(Call.good(ops_of(library)[0]).args)
    check(refusal(library, "run_named", name, args, None), UNKNOWN, shown)


def test_the_gemv_refuses_what_it_has_no_kernel_for(library: Library) -> None:
    gemv = next((tactic for tactic in library.tactics if tactic.is_gemv), None)
    if gemv is None:
        pytest.skip(f"this library has no gemv: {library.build()['gemv_reason']}")
    for op in sorted(gemv.quant_ops):
        for m in (gemv.m_max + 1, 64, 65, 2**31 - 1):
            call = accepted(library, op, gemv.index)
            assert call is not None, op.label
            call.given.m = m
            check(run(library, call), UNSUPPORTED, r"\bM\b")
        if op is not PER_COLUMN:
            call = accepted(library, op, gemv.index)
            assert call is not None
            call.given.group_size = 256
            check(run(library, call), UNSUPPORTED, "group")
        # 2**31 weights, one more than its 32-bit offsets count; too many columns for its grid.
        for n, k in ((2**15, 2**16), (2**31 - 8, 256)):
            call = accepted(library, op, gemv.index)
            assert call is not None
            call.given.n, call.given.k = n, k
            check(run(library, call), UNSUPPORTED, r"\bN\b")


def test_a_gemm_refuses_groups_that_are_no_multiple_of_its_tile(library: Library) -> None:
    for tactic in library.tactics:
        for op in tactic.quant_ops & set(GROUPED):
            if tactic.kind != "gemm":
                continue
            for group in (32, 96):
                call = Call.good(op, tactic.index)
                call.given.k, call.given.group_size = 192, group
                check(run(library, call), UNSUPPORTED, "group")


def test_a_decode_tactic_refuses_groups_rows_and_extents_beyond_its_own(library: Library) -> None:
    decode = [tactic for tactic in library.tactics if tactic.is_decode]
    if not decode:
        pytest.skip("this library has no decode tactic")
    for tactic in decode:
        groups = [96] if 32 in tactic.groups else [32, 96]
        for op in GROUPED:
            for group in groups:
                call = Call.good(op, tactic.index)
                call.given.k, call.given.group_size = 192, group
                check(run(library, call), UNSUPPORTED, f"group size {group} .* K = 192")
        call = Call.good(GROUP_SCALE, tactic.index, m=tactic.m_max + 1)
        check(run(library, call), UNSUPPORTED, r"\bM\b")
        for n, k in ((2**30 + 8, 64), (8, 2**30 + 64)):
            call = Call.good(GROUP_SCALE, tactic.index)
            call.given.n, call.given.k = n, k
            check(run(library, call), UNSUPPORTED, r"\b[NK]\b")


def test_extents_whose_tiles_overflow_are_refused(library: Library) -> None:
    for call in accepted_calls(library, by_tactic=True):
        call.given.m, call.given.n = 2**31 - 1, 2**31 - 8
        names = "" if call.tactic == AUTO else r"\b[MN]\b"
        check(run(library, call), (INVALID, UNSUPPORTED), names)


def test_no_rows_are_a_success_without_a_device(library: Library) -> None:
    for call in accepted_calls(library, by_tactic=True):
        call.given.m = 0
        assert run(library, call)[0] is Status.OK, library.last_error()
        assert library.workspace_size(call.tactic, call.given) == 0


@pytest.mark.parametrize("device", [-2, -(2**31)])
def test_a_negative_device_is_refused(library: Library, device: int) -> None:
    found = refusal(library, "check_device", device, None)
    check(found, INVALID, "device")


def test_a_device_that_does_not_exist_is_refused(library: Library) -> None:
    status, message = refusal(library, "check_device", 4096, None)
    assert status not in (Status.OK, Status.ERROR_INTERNAL)
    assert message


@pytest.mark.parametrize(
    "arch",
    [
        b"",
        b"sm_",
        b"sm_70",
        b"sm_91",
        b"90",
        b"SM_90",
        b"sm_90b",
        b"sm_90aa",
        b"sm_89a",
        b"sm_080",
        b"sm_9999999999999999999",
        b"x" * 5000,
        b"%s%n",
    ],
)
def test_packing_for_an_unknown_architecture_is_refused(library: Library, arch: bytes) -> None:
    room = (ctypes.c_uint8 * 256)()
    out = (ctypes.c_uint8 * 256)()
    size = ctypes.c_size_t()
    check(refusal(library, "packed_size", arch, 64, 8, ctypes.byref(size)), INVALID, "arch")
    check(refusal(library, "pack", arch, room, 64, 8, out, 1), INVALID, "arch")
    check(refusal(library, "unpack", arch, room, 64, 8, out, 1), INVALID, "arch")


@pytest.mark.parametrize(
    ("k", "n", "names"),
    [
        (0, 8, "K"),
        (-64, 8, "K"),
        (32, 8, "K"),
        (65, 8, "K"),
        (2**62, 8, "K"),
        (2**32 + 64, 8, "K"),
        (64, 0, "N"),
        (64, -8, "N"),
        (64, 4, "N"),
        (64, 9, "N"),
        (64, 2**62, "N"),
        (64, 2**32 + 8, "N"),
    ],
)
def test_packing_a_wrong_shape_is_refused(library: Library, k: int, n: int, names: str) -> None:
    room = (ctypes.c_uint8 * 256)()
    out = (ctypes.c_uint8 * 256)()
    size = ctypes.c_size_t()
    shown = rf"\b{names}\b"
    check(refusal(library, "packed_size", None, k, n, ctypes.byref(size)), INVALID, shown)
    check(refusal(library, "pack", None, room, k, n, out, 1), INVALID, shown)
    check(refusal(library, "unpack", None, room, k, n, out, 1), INVALID, shown)
    assert not any(out)


def test_packing_without_buffers_or_onto_itself_is_refused(library: Library) -> None:
    room = (ctypes.c_uint8 * 512)()
    out = (ctypes.c_uint8 * 256)()
    here = ctypes.addressof(room)
    check(refusal(library, "packed_size", None, 64, 8, None), INVALID, "bytes")
    check(refusal(library, "pack", None, None, 64, 8, out, 1), INVALID, r"\bq\b")
    check(refusal(library, "pack", None, room, 64, 8, None, 1), INVALID, r"\bout\b")
    check(refusal(library, "unpack", None, None, 64, 8, out, 1), INVALID, r"\bpacked\b")
    check(refusal(library, "unpack", None, room, 64, 8, None, 1), INVALID, r"\bq\b")
    check(refusal(library, "pack", None, here, 64, 8, here + 255, 1), INVALID, "overlap")
    check(refusal(library, "pack", None, here + 255, 64, 8, here, 1), INVALID, "overlap")
    check(refusal(library, "unpack", None, here, 64, 8, here, 1), INVALID, "overlap")
    assert refusal(library, "pack", None, here, 64, 8, here + 256, 1)[0] is Status.OK
    check(refusal(library, "pack", None, room, 64, 8, out, -1), INVALID, "threads")


def weight_args(source: Source = Source.PLAIN) -> PackArgs:
    """A weight that may be packed; its addresses are aligned, and lead nowhere."""
    args = pack_args(source, None, (128, 16), (128, 16), NOWHERE, None, NOWHERE + 0x1000_0000)
    args.rows = NOWHERE + 0x2000_0000
    return args


#: What is wrong, on which sources, and how the message calls it.
WEIGHTS: list[tuple[dict[str, Any], tuple[Source, ...], str]] = [
    ({"struct_size": 0}, tuple(Source), "struct_size"),
    ({"struct_size": 64}, tuple(Source), "struct_size"),
    ({"struct_size": 2**32 - 1}, tuple(Source), "struct_size"),
    ({"source": -1}, (Source.PLAIN,), "source"),
    ({"source": 5}, (Source.PLAIN,), "source"),
    ({"source": 2**31 - 1}, (Source.PLAIN,), "source"),
    ({"arch": b"sm_70"}, tuple(Source), "arch"),
    ({"arch": b""}, tuple(Source), "arch"),
    ({"k": 0}, tuple(Source), r"\bK\b"),
    ({"k": -64}, tuple(Source), r"\bK\b"),
    ({"k": 96}, tuple(Source), r"\bK\b"),
    ({"k": 2**62}, tuple(Source), r"\bK\b"),
    ({"n": 0}, tuple(Source), r"\bN\b"),
    ({"n": 12}, tuple(Source), r"\bN\b"),
    ({"n": 2**32 + 16}, tuple(Source), r"\bN\b"),
    ({"source_k": 0}, tuple(Source), "source_k"),
    ({"source_k": -8}, tuple(Source), "source_k"),
    ({"source_k": 136}, tuple(Source), "source_k"),
    ({"source_k": 2**62}, tuple(Source), "source_k"),
    ({"source_k": 60}, (Source.GPTQ, Source.COMPRESSED_TENSORS), "source_k"),
    ({"source_n": 0}, tuple(Source), "source_n"),
    ({"source_n": -8}, tuple(Source), "source_n"),
    ({"source_n": 24}, tuple(Source), "source_n"),
    ({"source_n": 2**62}, tuple(Source), "source_n"),
    ({"source_n": 12}, (Source.AWQ,), "source_n"),
    ({"source_n": 15}, (Source.PLAIN,), "source_n"),
    ({"q": None}, tuple(Source), r"\bq\b"),
    ({"out": None}, tuple(Source), r"\bout\b"),
    ({"out": NOWHERE}, tuple(Source), "overlap"),
    ({"out": NOWHERE + 1008}, tuple(Source), "overlap"),
    ({"q": NOWHERE + 0x1000_0000 + 1008}, tuple(Source), "overlap"),
    ({"out": NOWHERE + 0x2000_0000 + 496}, tuple(Source), "overlap"),
]


@pytest.mark.parametrize(
    ("members", "sources", "names"), WEIGHTS, ids=lambda value: str(value)[:40]
)
def test_a_wrong_weight_is_refused_on_the_cpu_and_on_the_gpu(
    library: Library, members: dict[str, Any], sources: tuple[Source, ...], names: str
) -> None:
    for source in sources:
        args = weight_args(source)
        for name, value in members.items():
            setattr(args, name, value)
        here = ctypes.byref(args)
        check(refusal(library, "pack_weight", here, 1), INVALID, names, source.label)
        check(refusal(library, "pack_weight_device", here, None), INVALID, names, source.label)


def test_a_weight_without_arguments_or_with_negative_threads_is_refused(library: Library) -> None:
    check(refusal(library, "pack_weight", None, 1), INVALID, "args")
    check(refusal(library, "pack_weight_device", None, None), INVALID, "args")
    args = weight_args()
    args.rows = None
    check(refusal(library, "pack_weight", ctypes.byref(args), -1), INVALID, "threads")


@pytest.mark.parametrize("wrong", [-2, 120, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("source", Source, ids=lambda source: source.label)
def test_a_row_that_the_source_lacks_is_refused_by_its_index_and_nothing_is_written(
    library: Library, source: Source, wrong: int
) -> None:
    q = (ctypes.c_uint8 * 1920)()  # enough for a byte a value
    out = (ctypes.c_uint8 * 1024)()
    rows = (ctypes.c_int32 * 128)(*range(120), *[-1] * 8)
    addresses = (ctypes.addressof(q), ctypes.addressof(rows), ctypes.addressof(out))
    args = pack_args(source, None, (128, 16), (120, 16), *addresses)
    for place in (0, 77, 127):
        before = rows[place]
        rows[place] = wrong
        found = refusal(library, "pack_weight", ctypes.byref(args), 1)
        check(found, INVALID, rf"rows\[{place}\] is {wrong}\b")
        rows[place] = before
    assert not any(out)
    assert refusal(library, "pack_weight", ctypes.byref(args), 1)[0] is Status.OK


@pytest.mark.parametrize(("row", "column"), [(0, 0), (77, 6), (119, 14)])
def test_a_byte_above_15_is_refused_by_its_place(library: Library, row: int, column: int) -> None:
    q = (ctypes.c_uint8 * (120 * 15))()
    out = (ctypes.c_uint8 * 1024)()
    addresses = (ctypes.addressof(q), None, ctypes.addressof(out))
    args = pack_args(Source.BYTES, None, (128, 16), (120, 15), *addresses)
    for value in (16, 31, 128, 255):
        q[row * 15 + column] = value
        found = refusal(library, "pack_weight", ctypes.byref(args), 2)
        check(found, INVALID, rf"q\[{row}\]\[{column}\] is {value}\b")
    q[row * 15 + column] = 15
    assert refusal(library, "pack_weight", ctypes.byref(args), 2)[0] is Status.OK


def test_device_memory_that_is_not_aligned_is_refused_before_a_device_is_looked_for(
    library: Library,
) -> None:
    for source in Source:
        for member, shifts in (("q", (1, 2)), ("rows", (1, 2)), ("out", (1, 2, 4, 8))):
            if member == "q" and source in (Source.PLAIN, Source.BYTES):
                continue  # bytes
            for shift in shifts:
                args = weight_args(source)
                setattr(args, member, getattr(args, member) + shift)
                found = refusal(library, "pack_weight_device", ctypes.byref(args), None)
                check(found, MISALIGNED, rf"\b{member}\b", source.label)
    there = NOWHERE + 0x1000_0000
    for shift in (1, 2, 4, 8):
        found = refusal(library, "unpack_device", None, NOWHERE + shift, 64, 8, there, None)
        check(found, MISALIGNED, r"\bpacked\b")
    for shift in (1, 2):
        found = refusal(library, "unpack_device", None, NOWHERE, 64, 8, there + shift, None)
        check(found, MISALIGNED, r"\bq\b")


def test_unpacking_wrongly_on_the_gpu_is_refused(library: Library) -> None:
    there = NOWHERE + 0x1000_0000
    for arguments, names in (
        ((b"sm_70", NOWHERE, 64, 8, there), "arch"),
        ((None, NOWHERE, 65, 8, there), r"\bK\b"),
        ((None, NOWHERE, 64, 9, there), r"\bN\b"),
        ((None, None, 64, 8, there), r"\bpacked\b"),
        ((None, NOWHERE, 64, 8, None), r"\bq\b"),
        ((None, NOWHERE, 64, 8, NOWHERE + 240), "overlap"),
    ):
        check(refusal(library, "unpack_device", *arguments, None), INVALID, names)


def test_more_than_any_gpu_holds_is_refused(library: Library) -> None:
    most = 2**31 - 64
    args = pack_args(Source.GPTQ, None, (most, most), (8, 8), 1 << 12, None, 1 << 62)
    found = refusal(library, "pack_weight_device", ctypes.byref(args), None)
    check(found, UNSUPPORTED, r"\bK\b")
    found = refusal(library, "unpack_device", None, 1 << 12, most, most, 1 << 62, None)
    check(found, UNSUPPORTED, r"\bK\b")


#: m, x_stride, k_in, k_out, and what the message names.
GATHERS = [
    ((-1, 64, 64, 64), r"\bm\b"),
    ((2**31, 64, 64, 64), r"\bm\b"),
    ((2**62, 64, 64, 64), r"\bm\b"),
    ((4, 63, 64, 64), "x_stride"),
    ((4, -64, 64, 64), "x_stride"),
    ((4, 2**31, 64, 64), "x_stride"),
    ((4, 64, 0, 64), "k_in"),
    ((4, 64, -8, 64), "k_in"),
    ((4, 2**31, 2**31, 64), "k_in"),
    ((4, 64, 64, 0), "k_out"),
    ((4, 64, 64, -8), "k_out"),
    ((4, 64, 64, 60), "k_out"),
    ((4, 64, 64, 2**31), "k_out"),
]


@pytest.mark.parametrize(("shape", "names"), GATHERS)
def test_picking_columns_of_a_wrong_shape_is_refused(
    library: Library, shape: tuple[int, int, int, int], names: str
) -> None:
    m, stride, k_in, k_out = shape
    out = NOWHERE + 0x1000_0000
    for columns in (None, NOWHERE + 0x2000_0000):
        arguments = (NOWHERE, m, stride, k_in, columns, k_out, out, None)
        check(refusal(library, "gather_columns", *arguments), INVALID, names)


def test_picking_columns_between_wrong_addresses_is_refused(library: Library) -> None:
    out, columns = NOWHERE + 0x1000_0000, NOWHERE + 0x2000_0000

    def gather(x: int | None, columns: int | None, out: int | None) -> tuple[Status, str]:
        return refusal(library, "gather_columns", x, 4, 64, 64, columns, 64, out, None)

    check(gather(None, columns, out), INVALID, r"\bx\b")
    check(gather(NOWHERE, columns, None), INVALID, r"\bout\b")
    check(gather(NOWHERE + 1, columns, out), MISALIGNED, r"\bx\b")
    for shift in (1, 2, 4, 8):
        check(gather(NOWHERE, columns, out + shift), MISALIGNED, r"\bout\b")
    for shift in (1, 2):
        check(gather(NOWHERE, columns + shift, out), MISALIGNED, r"\bcolumns\b")
    check(gather(NOWHERE, columns, NOWHERE), INVALID, "overlap")
    check(gather(NOWHERE, columns, NOWHERE + 496), INVALID, "overlap")
    check(gather(NOWHERE + 510, columns, NOWHERE), INVALID, "overlap")


def test_picking_columns_of_no_rows_is_a_success_without_a_device(library: Library) -> None:
    assert refusal(library, "gather_columns", None, 0, 64, 64, None, 64, None, None)[0] is Status.OK


def test_right_arguments_of_packing_and_picking_get_as_far_as_the_device(library: Library) -> None:
    """The cases here fail for what they spoil, not for something else."""
    try:
        library.check_device()
    except ApiError as error:
        wanted = error.status
    else:
        pytest.skip("with a GPU these would be launched on addresses that lead nowhere")
    out, columns = NOWHERE + 0x1000_0000, NOWHERE + 0x2000_0000
    for source in Source:
        args = ctypes.byref(weight_args(source))
        assert refusal(library, "pack_weight_device", args, None)[0] is wanted
    assert refusal(library, "unpack_device", None, NOWHERE, 64, 8, out, None)[0] is wanted
    for at in (None, columns):
        found = refusal(library, "gather_columns", NOWHERE, 4, 64, 64, at, 64, out, None)
        assert found[0] is wanted


def test_each_thread_has_its_own_last_error(library: Library) -> None:
    barrier = threading.Barrier(8)
    wrong: list[str] = []

    def work(turn: int) -> None:
        for repeat in range(200):
            k = 65 + turn
            if repeat == 0:
                if library.last_error():
                    wrong.append(f"a new thread's last error is {library.last_error()!r}")
                barrier.wait(timeout=60)
            library.status_of_supports(AUTO, problem(PER_COLUMN, 1, 8, k))
            if str(k) not in library.last_error():
                wrong.append(f"thread {turn}: {library.last_error()!r}")

    threads = [threading.Thread(target=work, args=(turn,)) for turn in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not wrong, wrong[:5]
