# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E501, F403, F405
# mypy: ignore-errors
"""Writes the explicit instantiations of the GEMM kernels, as upstream's generator of this name does."""

import argparse
import os
from collections import defaultdict
from dataclasses import dataclass
from itertools import product

from cutlass_library import *

NAMESPACE_BEGIN = "namespace tensorrt_llm\n{"
NAMESPACE_END = "} // namespace tensorrt_llm"

FPA_INTB = "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.inl"
MOE_LAUNCHERS = "tensorrt_llm/kernels/cutlass_kernels/moe_gemm/launchers"
MOE = f"{MOE_LAUNCHERS}/moe_gemm_tma_ws_launcher.inl"
MOE_MIXED = f"{MOE_LAUNCHERS}/moe_gemm_tma_ws_mixed_input_launcher.inl"
MOE_SM80 = f"{MOE_LAUNCHERS}/fused_moe_gemm_launcher_sm80.inl"

# Operations in a file.
GROUP_SIZE = 8

# The instantiations name CUDA's types, not CUTLASS's.
CUDA_TYPE = {DataType.e4m3: "__nv_fp8_e4m3", DataType.bf16: "__nv_bfloat16", DataType.f16: "half"}

QUANT_OPS = [
    f"cutlass::WeightOnlyQuantOp::{name}"
    for name in ("PER_COLUMN_SCALE_ONLY", "FINEGRAINED_SCALE_ONLY", "FINEGRAINED_SCALE_AND_ZEROS")
]

# (activation, weight, scale and zero, bias, output)
MIXED_TYPES = [
    (DataType.e4m3, DataType.u4, DataType.f16, DataType.f16, DataType.f16),
    (DataType.f16, DataType.u4, DataType.f16, DataType.f16, DataType.f16),
    (DataType.bf16, DataType.u4, DataType.bf16, DataType.bf16, DataType.bf16),
    (DataType.f16, DataType.u8, DataType.f16, DataType.f16, DataType.f16),
]
CTA_SHAPES_MN = [(64, 16), (64, 32), (128, 32)]
CLUSTERS = [(1, 1, 1), (2, 1, 1)]


@dataclass(frozen=True)
class Operation:
    kind: GemmKind
    arch: int
    cta_m: int
    launcher: str
    text: str
    suffix: str = ""


def shape(extents):
    return "cute::Shape<" + ", ".join(f"cute::Int<{extent}>" for extent in extents) + ">"


def schedules(cta_m):
    if cta_m == 128:
        return (
            KernelScheduleTag[KernelScheduleType.TmaWarpSpecializedCooperative],
            EpilogueScheduleTag[EpilogueScheduleType.TmaWarpSpecializedCooperative],
        )
    return (
        KernelScheduleTag[KernelScheduleType.TmaWarpSpecializedPingpong],
        EpilogueScheduleTag[EpilogueScheduleType.TmaWarpSpecialized],
    )


def mixed_gemm_operations():
    for types, quant_op, mn, cluster in product(MIXED_TYPES, QUANT_OPS, CTA_SHAPES_MN, CLUSTERS):
        if cluster[0] == 2 and mn[0] != 128:
            continue
        act, scale, bias, out = (CUDA_TYPE[types[i]] for i in (0, 2, 3, 4))
        weight = DataTypeTag[types[1]]
        cta = (*mn, 128 * 8 // DataTypeSize[types[0]])
        mainloop, epilogue = schedules(cta[0])
        text = f"""
template void sm90_generic_mixed_gemm_kernelLauncher<{act}, {weight}, {scale}, {bias}, {out},
{quant_op}, tensorrt_llm::cutlass_extensions::EpilogueOpBias,
{shape(cta)}, {shape(cluster)},
{mainloop}, {epilogue}> (
const {act}*, const {weight}*, const {scale}*, const {scale}*, const {bias}*, const float,
{out}*, int, int, int, const int, tensorrt_llm::cutlass_extensions::CutlassGemmConfig, char*, size_t, cudaStream_t, int*
);
"""
        yield Operation(GemmKind.Gemm, 90, cta[0], FPA_INTB, text)


def grouped_gemm_operations():
    for kind, n in product((DataType.f16, DataType.bf16), (16, 32)):
        act = CUDA_TYPE[kind]
        guard = "defined(ENABLE_BF16)" if kind == DataType.bf16 else "1"
        text = f"""
#if {guard} && {guard}\n
        INSTANTIATE_TMA_WARP_SPECIALIZED_MOE_GEMM(Sm90, {act}, {act}, {act},
                EpilogueOpDefault, NONE, 128, {n}, 64, 1, 1, 1, false, false);\n
#endif
"""
        yield Operation(GemmKind.Grouped, 90, 128, MOE, text)


def mixed_grouped_gemm_operations():
    act, weight, out = CUDA_TYPE[DataType.e4m3], DataTypeTag[DataType.u4], CUDA_TYPE[DataType.f16]
    for mn in CTA_SHAPES_MN:
        cta, (mainloop, epilogue) = shape((*mn, 128)), schedules(mn[0])
        text = f"""
template void sm90_generic_mixed_moe_gemm_kernelLauncher<{act}, {weight}, {out},
tensorrt_llm::cutlass_extensions::EpilogueOpDefault, {cta}, {shape((1, 1, 1))}, {mainloop}, {epilogue}, {QUANT_OPS[1]}> (
GroupedGemmInput<{act}, {weight}, {out}, {out}>inputs, TmaWarpSpecializedGroupedGemmInput hopper_inputs, int sm_count_, size_t* workspace_size);
"""
        yield Operation(GemmKind.Grouped, 90, mn[0], MOE_MIXED, text, "_Mixed")


def sm80_operations():
    act = DataTypeTag[DataType.f16]
    for stages in (2, 3):
        text = f"""
            template void sm80_generic_fused_moe_gemm_kernelLauncher<{act}, {act}, 128, 128, 64, {stages}, tensorrt_llm::cutlass_extensions::EpilogueOpDefault>
                    ({act} const* A, {act} const* B, {act}* C, int num_experts, cudaStream_t stream, int* kernel_occupancy);
    """
        yield Operation(GemmKind.Grouped, 80, 128, MOE_SM80, text)


def write_file(path, operations):
    instantiations = "\n".join(operation.text for operation in operations)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(f"""#include "{operations[0].launcher}"
{NAMESPACE_BEGIN}
namespace kernels
{{
namespace cutlass_kernels
{{

{instantiations}

}} // namespace cutlass_kernels
}} // namespace kernels
{NAMESPACE_END}
""")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output_dir", required=True, help="Path to the output directory")
    parser.add_argument(
        "-a", "--architectures", required=True, help="Architectures to generate kernels for"
    )
    args = parser.parse_args()

    operations = list(sm80_operations())
    if {"90", "90-real"} & set(args.architectures.split(";")):
        operations += mixed_gemm_operations()
        operations += grouped_gemm_operations()
        operations += mixed_grouped_gemm_operations()

    files = defaultdict(list)
    for operation in operations:
        files[operation.kind, operation.arch, operation.cta_m, operation.suffix].append(operation)
    for (kind, arch, cta_m, suffix), members in files.items():
        name = GemmKindNames[kind]
        for i in range(0, len(members), GROUP_SIZE):
            file = f"cutlass_kernel_file_{name}_sm{arch}_M{cta_m}{suffix}_group{i // GROUP_SIZE}.generated.cu"
            path = os.path.join(os.path.abspath(args.output_dir), name, str(arch), file)
            write_file(path, members[i : i + GROUP_SIZE])


if __name__ == "__main__":
    main()
