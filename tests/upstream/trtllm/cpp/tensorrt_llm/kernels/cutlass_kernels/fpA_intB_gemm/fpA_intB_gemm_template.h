// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/epilogue/collective/collective_epilogue.hpp"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/numeric_types.h"
#include "cutlass_extensions/epilogue_helpers.h"
#include "tensorrt_llm/common/cudaUtils.h"
#include "tensorrt_llm/kernels/cutlass_kernels/cutlass_heuristic.h"
#include "tensorrt_llm/kernels/cutlass_kernels/cutlass_type_conversion.h"
#include "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/fpA_intB_gemm.h"
#include "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.h"

#include <stdexcept>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
template <typename ActivationType, typename WeightType, cutlass::WeightOnlyQuantOp QuantOp, typename ScaleZeroType,
    typename BiasType, typename OutputType>
void CutlassFpAIntBGemmRunner<ActivationType, WeightType, QuantOp, ScaleZeroType, BiasType, OutputType>::gemm(
    void const* A, void const* B, void const* weight_scales, void const* weight_zero_points, void const* biases,
    float const alpha, void* C, int m, int n, int k, int const group_size, Config gemmConfig, char* workspace_ptr,
    size_t const workspace_bytes, cudaStream_t stream)
{
    using namespace tensorrt_llm::cutlass_extensions;
#define TRY_TACTIC(M, N, CLUSTER, MAINLOOP, EPILOGUE)                                                                  \
    if (gemmConfig.tile_config_sm90 == CutlassTileConfigSM90::CtaShape##M##x##N##x128B                                 \
        && gemmConfig.cluster_shape == ClusterShape::ClusterShape_##CLUSTER##x1x1)                                     \
    {                                                                                                                  \
        constexpr int kTileK = 128 / sizeof(ActivationType);                                                           \
        sm90_generic_mixed_gemm_kernelLauncher<ActivationType, WeightType, ScaleZeroType, BiasType, OutputType,        \
            QuantOp, EpilogueOpBias, cute::Shape<cute::Int<M>, cute::Int<N>, cute::Int<kTileK>>,                       \
            cute::Shape<cute::Int<CLUSTER>, cute::Int<1>, cute::Int<1>>, cutlass::gemm::MAINLOOP,                      \
            cutlass::epilogue::EPILOGUE>(static_cast<ActivationType const*>(A), static_cast<WeightType const*>(B),     \
            static_cast<ScaleZeroType const*>(weight_scales), static_cast<ScaleZeroType const*>(weight_zero_points),   \
            static_cast<BiasType const*>(biases), alpha, static_cast<OutputType*>(C), m, n, k, group_size, gemmConfig, \
            workspace_ptr, workspace_bytes, stream);                                                                   \
        return;                                                                                                        \
    }
    TRY_TACTIC(64, 16, 1, KernelTmaWarpSpecializedPingpong, TmaWarpSpecialized)
    TRY_TACTIC(64, 32, 1, KernelTmaWarpSpecializedPingpong, TmaWarpSpecialized)
    TRY_TACTIC(128, 32, 1, KernelTmaWarpSpecializedCooperative, TmaWarpSpecializedCooperative)
    TRY_TACTIC(128, 32, 2, KernelTmaWarpSpecializedCooperative, TmaWarpSpecializedCooperative)
#undef TRY_TACTIC
    throw std::runtime_error("[TensorRT LLM Error][fpA_intB] Config is invalid for mixed type GEMM.");
}

template <typename ActivationType, typename WeightType, cutlass::WeightOnlyQuantOp QuantOp, typename ScaleZeroType,
    typename BiasType, typename OutputType>
size_t
CutlassFpAIntBGemmRunner<ActivationType, WeightType, QuantOp, ScaleZeroType, BiasType, OutputType>::getWorkspaceSize(
    int const m, int const n, int const)
{
    // A word for each tile of the smallest stream-K tile, clusters rounded up.
    return sizeof(int) * (size_t(n) / 128 + 2) * (size_t(m) / 32 + 1);
}

template <typename ActivationType, typename WeightType, cutlass::WeightOnlyQuantOp QuantOp, typename ScaleZeroType,
    typename BiasType, typename OutputType>
std::vector<tensorrt_llm::cutlass_extensions::CutlassGemmConfig>
CutlassFpAIntBGemmRunner<ActivationType, WeightType, QuantOp, ScaleZeroType, BiasType, OutputType>::getConfigs() const
{
    return get_candidate_configs(tensorrt_llm::common::getSMVersion(), 7,
        static_cast<Config::CandidateConfigTypeParam>(Config::WEIGHT_ONLY | Config::HOPPER));
}
} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
