// SPDX-License-Identifier: Apache-2.0
#include "tensorrt_llm/kernels/cutlass_kernels/cutlass_heuristic.h"
#include "tensorrt_llm/common/assert.h"

#include <utility>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
using namespace tensorrt_llm::cutlass_extensions;

std::vector<CutlassGemmConfig> get_candidate_configs(
    int sm, int const, CutlassGemmConfig::CandidateConfigTypeParam const param)
{
    TLLM_CHECK_WITH_INFO(sm == 90, "the miniature has SM90 tactics only, not sm%d", sm);
    std::pair<CutlassTileConfigSM90, ClusterShape> const tactics[]{
        {CutlassTileConfigSM90::CtaShape64x16x128B, ClusterShape::ClusterShape_1x1x1},
        {CutlassTileConfigSM90::CtaShape64x32x128B, ClusterShape::ClusterShape_1x1x1},
        {CutlassTileConfigSM90::CtaShape128x32x128B, ClusterShape::ClusterShape_1x1x1},
        {CutlassTileConfigSM90::CtaShape128x32x128B, ClusterShape::ClusterShape_2x1x1},
    };
    std::vector<CutlassGemmConfig> configs;
    for (auto const& [tile, cluster] : tactics)
    {
        configs.emplace_back(tile, MainloopScheduleType::AUTO, EpilogueScheduleType::AUTO, cluster);
    }
    if (param & CutlassGemmConfig::WEIGHT_ONLY)
    {
        configs.emplace_back();
        configs.back().enableCudaKernel = true;
    }
    return configs;
}
} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
