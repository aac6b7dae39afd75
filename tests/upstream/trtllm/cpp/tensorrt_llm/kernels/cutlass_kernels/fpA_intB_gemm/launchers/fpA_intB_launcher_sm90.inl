// SPDX-License-Identifier: Apache-2.0
#include "cute/tensor.hpp"
#include "cutlass/arch/arch.h"
#include "cutlass/epilogue/collective/collective_epilogue.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/numeric_types.h"
#include "cutlass/util/packed_stride.hpp"

#include "cutlass_extensions/compute_occupancy.h"
#include "cutlass_extensions/epilogue_helpers.h"
#include "cutlass_extensions/gemm/collective/collective_mma_interleaved.hpp"
#include "cutlass_extensions/gemm_configs.h"

#include "tensorrt_llm/common/assert.h"
#include "tensorrt_llm/common/cudaUtils.h"
#include "tensorrt_llm/common/logger.h"
#include "tensorrt_llm/kernels/cutlass_kernels/cutlass_heuristic.h"
#include "tensorrt_llm/kernels/cutlass_kernels/cutlass_type_conversion.h"
#include "tensorrt_llm/kernels/cutlass_kernels/fpA_intB_gemm/launchers/fpA_intB_launcher_sm90.h"

#include <stdexcept>
#include <string>
#include <type_traits>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
template <typename ActivationType, typename WeightType, typename ScaleZeroType, typename BiasType, typename OutputType,
    cutlass::WeightOnlyQuantOp QuantOp, typename EpilogueTag, typename CTAShape, typename ClusterShape,
    typename MainloopScheduleType, typename EpilogueScheduleType>
void sm90_generic_mixed_gemm_kernelLauncher(ActivationType const* A, WeightType const* B,
    ScaleZeroType const* weight_scales, ScaleZeroType const* weight_zero_points, BiasType const* biases,
    float const alpha, OutputType* C, int m, int n, int k, int const group_size,
    tensorrt_llm::cutlass_extensions::CutlassGemmConfig gemm_config, char* workspace, size_t workspace_bytes,
    cudaStream_t stream, int* occupancy)
{
    TLLM_LOG_DEBUG(__PRETTY_FUNCTION__);

#ifdef COMPILE_HOPPER_TMA_GEMMS
    static_assert(std::is_same_v<EpilogueTag, tensorrt_llm::cutlass_extensions::EpilogueOpBias>);
    static_assert(!should_filter_tma_warp_specialized_gemm_problem_shape_v<cutlass::arch::Sm90, CTAShape, ClusterShape,
                  ActivationType>);
    using Activation = typename TllmToCutlassTypeAdapter<ActivationType>::type;
    using Weight = typename TllmToCutlassTypeAdapter<WeightType>::type;
    using Scale = typename TllmToCutlassTypeAdapter<ScaleZeroType>::type;
    using Bias = typename TllmToCutlassTypeAdapter<BiasType>::type;
    using Output = typename TllmToCutlassTypeAdapter<OutputType>::type;

    using WeightInfo = std::conditional_t<cutlass::hasZero(QuantOp), cute::tuple<Weight, Scale, Scale>,
        cute::tuple<Weight, Scale>>;
    using Dispatch = cutlass::gemm::MainloopSm90TmaGmmaRmemAWarpSpecializedMixedInput<4, ClusterShape,
        MainloopScheduleType>;
    using Stride = cute::Stride<int64_t, cute::_1, int64_t>;
    using Mainloop = cutlass::gemm::collective::CollectiveMmaInterleaved<Dispatch, CTAShape, WeightInfo, Stride,
        Activation, Stride>;
    using Epilogue = cutlass::epilogue::collective::CollectiveEpilogue<EpilogueScheduleType, CTAShape, Bias, Output>;
    using TileScheduler = std::conditional_t<cute::size<0>(CTAShape{}) == 64, cutlass::gemm::PersistentScheduler,
        cutlass::gemm::StreamKScheduler>;
    using GemmKernel = cutlass::gemm::kernel::GemmUniversal<cute::Shape<int, int, int, int>, Mainloop, Epilogue,
        TileScheduler>;
    using Gemm = cutlass::gemm::device::GemmUniversalAdapter<GemmKernel>;

    if (occupancy != nullptr)
    {
        *occupancy = tensorrt_llm::cutlass_extensions::compute_occupancy_for_kernel<GemmKernel, true>();
        return;
    }
    if (weight_scales == nullptr)
    {
        throw std::runtime_error("Weight scales must always be set to a non-null value.");
    }
    if constexpr (cutlass::isFinegrained(QuantOp))
    {
        constexpr int kTileK = cute::size<2>(CTAShape{});
        if (group_size % kTileK != 0)
        {
            throw std::runtime_error(
                "[TensorRT LLM Error][fpA_intB Runner] The group size must be a multiple of " + std::to_string(kTileK));
        }
        if ((weight_zero_points != nullptr) != cutlass::hasZero(QuantOp))
        {
            throw std::runtime_error("Weight zero pointer must be given with zeros and null without them.");
        }
    }
    else if (group_size != k)
    {
        throw std::runtime_error("Invalid group size for per column scaling kernels.");
    }
    else if (weight_zero_points != nullptr)
    {
        throw std::runtime_error("Weight zero-points must be null when running per column scaling");
    }

    typename Gemm::Arguments const args{n, m, k,
        {reinterpret_cast<Activation const*>(A), reinterpret_cast<Weight const*>(B),
            reinterpret_cast<Scale const*>(weight_scales), reinterpret_cast<Scale const*>(weight_zero_points),
            group_size, int(cutlass::packed_scale_rows(k, group_size))},
        {alpha, reinterpret_cast<Bias const*>(biases), reinterpret_cast<Output*>(C)}};
    Gemm gemm;
    if (gemm.get_workspace_size(args) > workspace_bytes)
    {
        // Upstream only logs this, and so does the miniature: whoever calls has to check.
        TLLM_LOG_ERROR("[TensorRT LLM Error][fpA_intB Runner] given workspace size insufficient.");
    }
    auto const demand = [](cutlass::Status status, char const* what)
    {
        if (status != cutlass::Status::kSuccess)
        {
            throw std::runtime_error(std::string("[TensorRT LLM Error][fpA_intB Runner] ") + what
                + " Error: " + cutlass::cutlassGetStatusString(status));
        }
    };
    demand(gemm.can_implement(args), "fpA_intB cutlass kernel will fail for params.");
    demand(gemm.initialize(args, workspace, stream), "Failed to initialize cutlass fpA_intB gemm.");
    demand(gemm.run(stream), "Failed to run cutlass fpA_intB gemm.");
#else  // COMPILE_HOPPER_TMA_GEMMS
    throw std::runtime_error("[TensorRT LLM Error][fpA_intB Runner] Please recompile with support for hopper.");
#endif // COMPILE_HOPPER_TMA_GEMMS
}
} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
