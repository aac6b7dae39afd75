"""Verification, on kernels, libraries and programs made up here."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from pipeline.decode import Decode, DecodeTactic
from pipeline.elf import ElfFacts, Undefined
from pipeline.errors import VerifyError
from pipeline.model import (
    QUANT_OPS,
    GemmKernel,
    Gemv,
    GemvFamily,
    GemvKernel,
    Instantiation,
    QuantOp,
    Selection,
    Shape3,
    shape_text,
)
from pipeline.sass import Code, DeviceKernel, Usage, decode_key
from pipeline.verify import (
    Check,
    Verification,
    check_dispatcher,
    check_gates,
    check_kernels,
    check_linkage,
    find_library,
    readable,
)


@dataclass(frozen=True)
class Limits:
    library_bytes: int = 1000
    spill_bytes: int = 0
    gemm_sass: tuple[str, ...] = ("HGMMA", "UTMALDG")
    narrow_sass: tuple[str, ...] = ("HMMA", "UTMALDG")
    wide_sass: tuple[str, ...] = ("HGMMA", "UTMALDG")


def gemm(op: QuantOp, cta: Shape3, cluster: Shape3) -> GemmKernel:
    instantiation = Instantiation(
        function="launcher",
        act="half",
        weight="cutlass::uint4b_t",
        scale_zero="half",
        bias="half",
        out="half",
        quant_op=op,
        epilogue="E",
        cta=cta,
        cluster=cluster,
        mainloop="M",
        epilogue_schedule="S",
        origin="a.cu",
        line=1,
        text="template void launcher<half>();",
        include=(),
        open_scope="",
        close_scope="",
    )
    tactic = f"sm90:{shape_text(cta)}:{shape_text(cluster)}"
    return GemmKernel(ident=f"gemm_{op}", tactic=tactic, quant_op=op, instantiation=instantiation)


TILE: Shape3 = (64, 16, 64)
ONE: Shape3 = (1, 1, 1)
NARROW = DecodeTactic(kind="narrow", rows=64, tokens=8, ctas_per_sm=1, normalizes=True)
WIDE = DecodeTactic(kind="wide", rows=128, tokens=32, ctas_per_sm=1, sets=2, cluster=2)
SELECTION = Selection(
    selected=(
        gemm("per_column", TILE, ONE),
        gemm("group_scale", TILE, ONE),
        gemm("group_scale_zero", TILE, ONE),
    ),
    dropped=(),
    ignored=(),
    gemv=Gemv(
        selected=(
            GemvFamily(
                ident="gemv_gs_g64",
                quant_op="group_scale",
                group_size=64,
                zero=False,
                bias=False,
                details="KernelDetails<FP16DetailsA, Int4DetailsW, Hopper, true, 64>",
                origin="b.cu",
                kernels=(GemvKernel(m=1, cta_n=8, threads=128),),
            ),
        ),
        dropped=(),
        reason="",
    ),
    decode=Decode(selected=(NARROW, WIDE)),
)


def device(name: str, opcodes: dict[str, int] | None = None, stack: int = 0) -> DeviceKernel:
    return DeviceKernel(
        symbol=name,
        name=name,
        usage=Usage(registers=168, stack_bytes=stack, shared_bytes=0, local_bytes=0),
        code=Code(architecture="sm_90a", code_bytes=64, opcodes=opcodes or {}, copies=1),
    )


def gemm_device(tile: Shape3 = TILE, zero: bool = False, **opcodes: int) -> DeviceKernel:
    shape = ", ".join(f"cute::C<{extent}>" for extent in tile)
    elements = "cutlass::integer_subbyte<4, false>" + ", cutlass::half_t" * (2 if zero else 1)
    return device(
        "void cutlass::device_kernel<GemmUniversal<int, CollectiveMmaInterleaved<"
        f"MainloopMixedInput<4, cute::tuple<cute::C<1>, cute::C<1>, cute::C<1> >, S>, "
        f"cute::tuple<{shape} >, cute::tuple<{elements} >, L, cutlass::half_t, L> > >(P)",
        opcodes or {"HGMMA": 12, "UTMALDG": 3},
    )


def gemv_device(m: int = 1) -> DeviceKernel:
    return device(
        "void t::weight_only::kernel<t::weight_only::KernelDetails<t::FP16DetailsA, "
        f"t::Int4DetailsW, t::Hopper, true, 64>, {m}, 8, 128, 64, false, false, false, false, "
        "__half>(__half*)"
    )


def decode_device(tactic: DecodeTactic, ident: str, **opcodes: int) -> DeviceKernel:
    usual = {"HMMA" if tactic.kind == "narrow" else "HGMMA": 8, "UTMALDG": 2}
    kind = "normalizing" if ident.endswith("_norm") else tactic.kind
    return device(
        f"void w4a16::decode::{kind}_kernel<w4a16::decode::{ident}>(CUtensorMap_st, "
        "CUtensorMap_st, w4a16::decode::Problem)",
        opcodes or usual,
    )


DECODE = [decode_device(t, kernel.ident) for t in (NARROW, WIDE) for kernel in t.kernels]
ALL = [
    *(gemm_device(), gemm_device(zero=True), gemv_device(), device("w4a16::own(int)")),
    *DECODE,
]
FACTS = ElfFacts(
    size=900,
    stripped=True,
    soname="libw4a16.so.1",
    needed=("libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"),
    runpath="",
    exported=("w4a16_run",),
    undefined=(Undefined(name="malloc", weak=False, library="libc.so.6"),),
)


def failed(checks: object) -> list[str]:
    assert hasattr(checks, "__iter__")
    return [f"{check.name}: {check.detail}" for check in checks if not check.ok]


def test_a_library_with_just_the_selected_kernels_passes() -> None:
    assert failed(check_kernels(ALL, SELECTION)) == []
    assert failed(check_linkage(FACTS)) == []
    assert failed(check_gates(FACTS, ALL, Limits(), SELECTION)) == []


def test_a_tactic_without_its_kernel_fails_for_each_quant_op() -> None:
    (problem,) = failed(check_kernels(ALL[1:], SELECTION))
    assert "sm90:64x16x64:1x1x1 per_column" in problem
    assert "sm90:64x16x64:1x1x1 group_scale" in problem


def test_a_missing_gemv_kernel_fails() -> None:
    (problem,) = failed(check_kernels([*ALL[:2], *DECODE], SELECTION))
    assert "gemv_gs_g64 m1" in problem


@pytest.mark.parametrize(
    ("stranger", "said"),
    [
        (gemm_device((128, 16, 64)), "gemm 128x16x64 1x1x1"),
        (gemv_device(2), "gemv m02"),
        (device("void other::kernel(int)"), "other::kernel"),
        (decode_device(NARROW, "decode_64x8_g48"), "decode_64x8_g48"),
    ],
)
def test_a_kernel_that_nobody_selected_fails(stranger: DeviceKernel, said: str) -> None:
    (problem,) = failed(check_kernels([*ALL, stranger], SELECTION))
    assert said in problem


def test_a_decode_tactic_that_lacks_a_kernel_fails_and_is_named() -> None:
    lost = DECODE[-1]
    (problem,) = failed(check_kernels([k for k in ALL if k is not lost], SELECTION))
    assert "decode:128x32:s2:c2 decode_128x32_s2_c2_g128" in problem


@pytest.mark.parametrize(
    ("tactic", "opcodes", "said"),
    [
        (NARROW, {"HGMMA": 1, "UTMALDG": 1}, "narrow decode kernel has HMMA"),
        (NARROW, {"HMMA": 1}, "narrow decode kernel has UTMALDG"),
        (WIDE, {"HMMA": 1, "UTMALDG": 1}, "wide decode kernel has HGMMA"),
    ],
)
@pytest.mark.parametrize("place", [0, -1])
def test_a_decode_kernel_without_an_opcode_of_the_gate_fails(
    tactic: DecodeTactic, opcodes: dict[str, int], said: str, place: int
) -> None:
    ident = tactic.kernels[place].ident
    kernels = [k for k in ALL if decode_key(k.name) != ident]
    kernels.append(decode_device(tactic, ident, **opcodes))
    (problem,) = failed(check_gates(FACTS, kernels, Limits(), SELECTION))
    assert said in problem
    assert ident in problem


def test_a_wide_decode_kernel_that_waits_for_each_of_its_wgmmas_fails() -> None:
    ident = WIDE.kernels[0].ident
    others = [k for k in ALL if decode_key(k.name) != ident]
    overlapping = decode_device(WIDE, ident, HGMMA=16, UTMALDG=2, WARPGROUP=19)
    assert failed(check_gates(FACTS, [*others, overlapping], Limits(), SELECTION)) == []
    serial = decode_device(WIDE, ident, HGMMA=16, UTMALDG=2, WARPGROUP=32)
    (problem,) = failed(check_gates(FACTS, [*others, serial], Limits(), SELECTION))
    assert "serialised" in problem
    assert ident in problem


def test_two_kernels_under_one_tactic_fail() -> None:
    (problem,) = failed(check_kernels([*ALL, gemm_device()], SELECTION))
    assert "second variant" in problem


def test_copies_of_a_kernel_are_reported_and_pass() -> None:
    twice = replace(ALL[0], code=replace(ALL[0].code, copies=2))
    checks = list(check_kernels([twice, *ALL[1:]], SELECTION))
    assert failed(checks) == []
    assert any("stored twice: gemm 64x16x64" in check.detail for check in checks)


def test_a_gemm_kernel_without_an_opcode_of_the_gate_fails() -> None:
    kernels = [gemm_device(HGMMA=1), *ALL[1:]]
    (problem,) = failed(check_gates(FACTS, kernels, Limits(), SELECTION))
    assert "UTMALDG" in problem


def test_a_spill_over_the_gate_fails_and_one_below_passes() -> None:
    kernels = [*ALL, device("w4a16::spills(int)", {"STL": 2}, stack=48)]
    (problem,) = failed(check_gates(FACTS, kernels, Limits(), SELECTION))
    assert "w4a16::spills (48 B)" in problem
    assert failed(check_gates(FACTS, kernels, Limits(spill_bytes=48), SELECTION)) == []


def test_a_library_over_the_gate_fails() -> None:
    (problem,) = failed(check_gates(replace(FACTS, size=1001), ALL, Limits(), SELECTION))
    assert "1001 B" in problem


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        (replace(FACTS, exported=("w4a16_run", "_ZN7cutlassE")), "_ZN7cutlassE"),
        (replace(FACTS, exported=()), "exports something"),
        (replace(FACTS, needed=("libcuda.so.1",)), "libcuda.so.1"),
        (replace(FACTS, needed=("libcublasLt.so.13",)), "libcublasLt"),
        (replace(FACTS, stripped=False), "symbol table"),
        (replace(FACTS, runpath="/home"), "/home"),
        (
            replace(FACTS, undefined=(Undefined(name="lost", weak=False, library=""),)),
            "no needed library has lost",
        ),
        (
            replace(
                FACTS, undefined=(Undefined(name="cuTensorMapEncodeTiled", weak=True, library=""),)
            ),
            "cuTensorMapEncodeTiled",
        ),
    ],
)
def test_bad_linkage_fails_and_names_the_culprit(facts: ElfFacts, said: str) -> None:
    (problem,) = failed(check_linkage(facts))
    assert said in problem


def info(folder: Path, answer: object) -> Path:
    program = folder / "bin" / "w4a16_info"
    program.parent.mkdir(parents=True)
    text = answer if isinstance(answer, str) else json.dumps(answer)
    (folder / "answer").write_text(text)
    program.write_text(f'#!/bin/sh\ncat "{folder}/answer"\n')
    program.chmod(0o755)
    return folder


TACTICS = {
    "tactics": [
        {
            "name": "sm90:64x16x64:1x1x1",
            "quant_ops": ["per_column", "group_scale", "group_scale_zero"],
        },
        {"name": "gemv", "quant_ops": ["group_scale"]},
        {"name": "decode:64x8", "quant_ops": list(QUANT_OPS)},
        {"name": "decode:128x32:s2:c2", "quant_ops": list(QUANT_OPS)},
    ]
}


def test_a_dispatcher_that_lists_the_selection_passes(tmp_path: Path) -> None:
    assert check_dispatcher(info(tmp_path, TACTICS), SELECTION, None).ok


def test_a_tactic_that_is_not_listed_fails(tmp_path: Path) -> None:
    check = check_dispatcher(info(tmp_path, {"tactics": TACTICS["tactics"][:1]}), SELECTION, None)
    assert not check.ok
    assert "not listed: gemv group_scale" in check.detail
    assert "not listed: decode:64x8 per_column" in check.detail


def test_a_listed_tactic_that_is_not_selected_fails(tmp_path: Path) -> None:
    for name in ("sm90:1x1x1:1x1x1", "decode:16x8"):
        more = [*TACTICS["tactics"], {"name": name, "quant_ops": ["per_column"]}]
        check = check_dispatcher(info(tmp_path / name, {"tactics": more}), SELECTION, None)
        assert f"not selected: {name} per_column" in check.detail


@pytest.mark.parametrize("answer", ["not JSON", "{}", '{"tactics": [{"name": "x"}]}', "[]"])
def test_a_program_that_answers_nonsense_fails(tmp_path: Path, answer: str) -> None:
    assert not check_dispatcher(info(tmp_path, answer), SELECTION, None).ok


def test_a_missing_program_fails(tmp_path: Path) -> None:
    assert not check_dispatcher(tmp_path, SELECTION, None).ok


def test_the_library_is_the_file_and_not_its_links(tmp_path: Path) -> None:
    folder = tmp_path / "lib"
    folder.mkdir()
    (folder / "libw4a16.so.1.0").write_bytes(b"x")
    (folder / "libw4a16.so").symlink_to("libw4a16.so.1.0")
    assert find_library(tmp_path) == folder / "libw4a16.so.1.0"


def test_an_install_tree_without_a_library_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VerifyError, match="holds 0 shared libraries"):
        find_library(tmp_path)


def test_all_failed_checks_are_in_one_error() -> None:
    result = Verification(
        library="lib/libw4a16.so",
        library_bytes=1,
        needed=(),
        exported=(),
        checks=(
            Check(name="one", ok=False, detail="a"),
            Check(name="two", ok=True, detail="b"),
            Check(name="three", ok=False, detail="c"),
        ),
        kernels=(),
    )
    with pytest.raises(VerifyError, match="2 of 3 checks") as caught:
        result.raise_if_failed()
    assert "one: a" in caught.value.details
    assert "three: c" in caught.value.details
    assert "two" not in caught.value.details
    replace(result, checks=result.checks[1:2]).raise_if_failed()


def test_kernels_have_short_names() -> None:
    assert readable(gemm_device(zero=True)) == "gemm 64x16x64 1x1x1 zero"
    assert readable(DECODE[0]) == "decode_64x8_g32"
    assert readable(gemv_device()) == "gemv m01 n8 t128 g64"
    assert readable(device("void w4a16::a::f<3>(int, int)")) == "w4a16::a::f<3>"


def test_a_real_library_is_checked_as_a_whole(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    (tmp_path / "lib").mkdir()
    (tmp_path / "a.cpp").write_text('extern "C" int w4a16_one() { return 1; }\n')
    target = tmp_path / "lib" / "libw4a16.so"
    command = [compiler, "-shared", "-fPIC", "-s", str(tmp_path / "a.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    from pipeline.elf import read_elf

    assert failed(check_linkage(read_elf(target))) == []
