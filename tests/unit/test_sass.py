"""Reading of device code, on text written in the shape of the tools' output."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.errors import VerifyError
from pipeline.sass import (
    Code,
    DeviceKernel,
    GemmKey,
    GemvKey,
    Usage,
    demangle,
    gemm_key,
    gemv_key,
    is_ours,
    parse_resource_usage,
    parse_sass,
    read_kernels,
    short_details,
    split_arguments,
)

USAGE = """\

Fatbin elf code:
================
arch = sm_90a
compressed

Resource usage:
 Common:
  GLOBAL:9 CONSTANT[4]:72
 Function _Z5firstPi:
  REG:168 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:3072 TEXTURE:0 SURFACE:0 SAMPLER:0
 Function _ZN5w4a166secondEPi:
  REG:20 STACK:64 SHARED:0 LOCAL:8 CONSTANT[0]:536 CONSTANT[2]:8 TEXTURE:0 SURFACE:0 SAMPLER:0
"""

SASS = """\

Fatbin elf code:
================
arch = sm_90a

	code for sm_90a
	.target	sm_90a

		Function : _Z5firstPi
	.headerflags	@"EF_CUDA_SM90 EF_CUDA_VIRTUAL_SM(EF_CUDA_SM90)"
        /*0000*/                   LDC R1, c[0x0][0x28] ;              /* 0x00000a00ff017b82 */
                                                                       /* 0x000fe20000000800 */
        /*0010*/              @!P0 BRA 0x190 ;                         /* 0x0000000000007919 */
        /*0020*/              @UP1 UTMALDG.2D [UR8], [UR4] ;           /* 0x0000000000007919 */
        /*0030*/                   HGMMA.64x16x16.F32 R24, R24, gdesc[UR4] ; /* 0x0 */
        /*0040*/                   HGMMA.64x16x16.F32 R24, R24, gdesc[UR8] ; /* 0x0 */
        /*0050*/                   NOP;                                /* 0x0 */
		..........


		Function : _ZN5w4a166secondEPi
        /*0000*/                   STL.64 [R1], R2 ;                   /* 0x0 */
        /*0010*/              @P2  LDL R2, [R1] ;                      /* 0x0 */
		..........

Fatbin elf code:
================
	code for sm_90a
		Function : _Z5firstPi
        /*0000*/                   EXIT ;                              /* 0x0 */
"""

POLICY = (
    "cutlass::gemm::MainloopSm90TmaGmmaRmemAWarpSpecializedMixedInput<4, "
    "cute::tuple<cute::C<2>, cute::C<1>, cute::C<1> >, cutlass::gemm::Schedule>"
)
TILE = "cute::tuple<cute::C<128>, cute::C<16>, cute::C<64> >"


def gemm_name(
    elements: str, other: str = "cutlass::half_t", collective: str = "Interleaved"
) -> str:
    return (
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int>, "
        f"cutlass::gemm::collective::CollectiveMma{collective}<{POLICY}, {TILE}, {elements}, "
        f"cute::tuple<long, cute::C<1>, long>, {other}, cute::tuple<long>, cute::TiledMMA<"
        "cute::MMA<(cute::GMMA::Major)0, (cute::GMMA::ScaleIn)1> > >, Epilogue<int>, void> >"
        "(cutlass::gemm::kernel::GemmUniversal<int>::Params)"
    )


INT4 = "cutlass::integer_subbyte<4, false>"
DETAILS = (
    "tensorrt_llm::kernels::weight_only::KernelDetails<"
    "tensorrt_llm::kernels::weight_only::FP16DetailsA, "
    "tensorrt_llm::kernels::weight_only::Int4DetailsW, "
    "tensorrt_llm::kernels::weight_only::ColumnMajorInterleavedForHopper, true, 64>"
)


def gemv_name(arguments: str, space: str = "tensorrt_llm::kernels") -> str:
    return f"void {space}::weight_only::kernel<{DETAILS}, {arguments}>(__half*, int, int, int)"


def test_resources_are_read_for_each_kernel() -> None:
    usage = parse_resource_usage(USAGE.splitlines())
    assert usage == {
        "_Z5firstPi": Usage(registers=168, stack_bytes=0, shared_bytes=1024, local_bytes=0),
        "_ZN5w4a166secondEPi": Usage(registers=20, stack_bytes=64, shared_bytes=0, local_bytes=8),
    }


def test_opcodes_are_counted_without_modifiers_and_predicates() -> None:
    code = parse_sass(SASS.splitlines())
    second = code["_ZN5w4a166secondEPi"]
    assert second.opcodes == {"LDL": 1, "STL": 1}
    assert second.code_bytes == 32
    assert second.architecture == "sm_90a"


def test_a_kernel_stored_twice_is_counted_twice() -> None:
    first = parse_sass(SASS.splitlines())["_Z5firstPi"]
    assert first.copies == 2
    assert first.code_bytes == 96 + 16


def test_the_opcodes_that_gates_name_are_found() -> None:
    one_image = SASS.rpartition("Fatbin")[0]
    opcodes = parse_sass(one_image.splitlines())["_Z5firstPi"].opcodes
    assert opcodes == {"BRA": 1, "HGMMA": 2, "LDC": 1, "NOP": 1, "UTMALDG": 1}


def test_text_without_kernels_has_none() -> None:
    assert parse_sass(["cuobjdump info : File 'x' does not contain device code"]) == {}
    assert parse_resource_usage([""]) == {}


def kernel(opcodes: dict[str, int], stack: int) -> DeviceKernel:
    return DeviceKernel(
        symbol="s",
        name="n",
        usage=Usage(registers=1, stack_bytes=stack, shared_bytes=0, local_bytes=4),
        code=Code(architecture="sm_90a", code_bytes=16, opcodes=opcodes, copies=1),
    )


def test_local_memory_is_a_spill_only_if_the_code_uses_it() -> None:
    assert kernel({"STL": 1}, 60).spill_bytes == 64
    assert kernel({"MOV": 1}, 60).spill_bytes == 0


def test_a_gemm_kernel_is_known_by_tile_cluster_and_zero() -> None:
    scale = gemm_key(gemm_name(f"cute::tuple<{INT4}, cutlass::half_t>"))
    zero = gemm_key(gemm_name(f"cute::tuple<{INT4}, cutlass::half_t, cutlass::half_t>"))
    assert scale == GemmKey(cta=(128, 16, 64), cluster=(2, 1, 1), zero=False)
    assert zero == GemmKey(cta=(128, 16, 64), cluster=(2, 1, 1), zero=True)


def test_a_gemm_kernel_of_an_older_release_is_known_by_its_policy() -> None:
    name = gemm_name(f"cute::tuple<{INT4}, cutlass::half_t>", collective="")
    assert gemm_key(name) == GemmKey(cta=(128, 16, 64), cluster=(2, 1, 1), zero=False)


def test_the_narrow_operand_is_found_on_either_side() -> None:
    name = gemm_name("cutlass::half_t", other=f"cute::tuple<{INT4}, cutlass::half_t>")
    assert gemm_key(name) == GemmKey(cta=(128, 16, 64), cluster=(2, 1, 1), zero=False)


def test_other_types_are_other_kernels() -> None:
    key = gemm_key(
        gemm_name("cute::tuple<signed char, cutlass::bfloat16_t>", "cutlass::bfloat16_t")
    )
    assert key is not None
    assert (key.weight, key.activation) == ("signedchar", "bfloat16_t")


@pytest.mark.parametrize(
    "name",
    [
        "w4a16::decode::kernel<8, 128>(int)",
        "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<int> >(int)",
        "void cutlass::Kernel2<Gemm<1, 2> >(Params)",
        "_ZN7cutlass13device_kernelE",
        "void cutlass::device_kernel<CollectiveMma<",
    ],
)
def test_what_is_no_mixed_input_gemm_has_no_key(name: str) -> None:
    assert gemm_key(name) is None


def test_a_gemv_kernel_is_known_by_its_arguments() -> None:
    key = gemv_key(gemv_name("3, 8, 128, 64, false, true, false, false, __half"))
    assert key == GemvKey(
        m=3,
        cta_n=8,
        threads=128,
        group_size=64,
        zero=True,
        bias=False,
        details="KernelDetails<FP16DetailsA,Int4DetailsW,ColumnMajorInterleavedForHopper,true,64>",
    )


def test_a_gemv_kernel_in_an_inline_namespace_is_the_same() -> None:
    arguments = "1, 8, 128, 0, false, false, true, false, __half"
    inline = gemv_name(arguments, space="tensorrt_llm::_v1::kernels")
    assert gemv_key(inline) == gemv_key(gemv_name(arguments))


def test_gemv_kernels_with_casts_in_their_names_are_read_too() -> None:
    plain = gemv_key(gemv_name("2, 8, 128, 0, false, false, true, false, __half"))
    cast = gemv_name("(int)2, (int)8, (int)128, (int)0, (bool)0, (bool)0, (bool)1, (bool)0, __half")
    assert gemv_key(cast) == plain


def test_gemv_kernels_that_nobody_selects_have_no_key() -> None:
    assert gemv_key(gemv_name("1, 8, 128, 64, true, false, false, false, __half")) is None
    assert gemv_key(gemv_name("1, 8, 128, 64, false, false, false, true, __half")) is None
    assert gemv_key("void other::kernel<1, 2>(int)") is None


def test_details_compare_without_namespaces_and_spaces() -> None:
    assert short_details(DETAILS) == short_details(
        DETAILS.replace("tensorrt_llm::kernels::", "x::")
    )


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("f<a, b<c, d>, (e)1>", ["a", "b<c, d>", "(e)1"]),
        ("f<>", []),
        ("f", []),
        ("f<a, b", []),
        ("f<g(int, int), h[2]>", ["g(int, int)", "h[2]"]),
    ],
)
def test_template_arguments_are_split_at_the_top_level(text: str, arguments: list[str]) -> None:
    assert split_arguments(text) == arguments


def test_our_kernels_are_known_by_their_namespace() -> None:
    assert is_ours("w4a16::pack(int)")
    assert is_ours("void w4a16::decode::gemm<4, 8>(Params)")
    assert is_ours("w4a16::(anonymous namespace)::warm_up(int*)")
    assert not is_ours("void other::w4a16::x(int)")
    assert not is_ours("void cutlass::device_kernel<w4a16::X>(int)")


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_deep_names_are_demangled() -> None:
    deep = "_ZN1aI" + "N1bI" * 300 + "i" + "EE" * 300 + "E1fEv"
    names = demangle(["_ZN5w4a164packEi", deep])
    assert names["_ZN5w4a164packEi"] == "w4a16::pack(int)"
    assert names[deep].startswith("a<b<b<")


def fake_cuobjdump(folder: Path, usage: str, sass: str, status: int = 0) -> Path:
    (folder / "usage").write_text(usage)
    (folder / "sass").write_text(sass)
    tool = folder / "cuobjdump"
    tool.write_text(
        f'#!/bin/sh\ncase $1 in -res-usage) cat "{folder}/usage";; *) cat "{folder}/sass";; esac\n'
        f"exit {status}\n"
    )
    tool.chmod(0o755)
    return tool


def test_a_library_s_kernels_are_read_with_both_of_the_tool_s_views(tmp_path: Path) -> None:
    kernels = read_kernels(tmp_path / "lib.so", fake_cuobjdump(tmp_path, USAGE, SASS))
    assert [kernel.name for kernel in kernels] == ["first(int*)", "w4a16::second(int*)"]
    assert kernels[1].spill_bytes == 72


def test_views_that_disagree_are_an_error(tmp_path: Path) -> None:
    tool = fake_cuobjdump(tmp_path, USAGE.replace("5first", "5third"), SASS)
    with pytest.raises(VerifyError, match="or the other way round"):
        read_kernels(tmp_path / "lib.so", tool)


def test_a_library_without_device_code_has_no_kernels(tmp_path: Path) -> None:
    text = "cuobjdump info    : File 'lib.so' does not contain device code\n"
    assert read_kernels(tmp_path / "lib.so", fake_cuobjdump(tmp_path, text, text, 255)) == ()


def test_a_tool_that_fails_is_an_error_with_its_words(tmp_path: Path) -> None:
    tool = fake_cuobjdump(tmp_path, "cuobjdump fatal : bad file\n", "", 1)
    with pytest.raises(VerifyError) as caught:
        read_kernels(tmp_path / "lib.so", tool)
    assert "bad file" in caught.value.details
