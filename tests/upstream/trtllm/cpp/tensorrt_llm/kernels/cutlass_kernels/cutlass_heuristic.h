// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass_extensions/gemm_configs.h"
#include "tensorrt_llm/common/cudaUtils.h"

#include <vector>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
// FAST_BUILD would leave tactics out; the miniature has so few that it never does.
template <class ArchTag, class TileShape, class ClusterShape, class ActivationType>
constexpr bool should_filter_tma_warp_specialized_gemm_problem_shape_v = false;

std::vector<tensorrt_llm::cutlass_extensions::CutlassGemmConfig> get_candidate_configs(
    int sm, int const max_split_k, tensorrt_llm::cutlass_extensions::CutlassGemmConfig::CandidateConfigTypeParam const);
} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
