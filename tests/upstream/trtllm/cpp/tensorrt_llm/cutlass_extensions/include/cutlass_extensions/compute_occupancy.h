// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/device_kernel.h"
#include "tensorrt_llm/common/cudaUtils.h"

#include <cuda_runtime.h>

namespace tensorrt_llm
{
namespace cutlass_extensions
{
template <typename GemmKernel, bool enable_cutlass_3x = false>
inline int compute_occupancy_for_kernel()
{
    static_assert(enable_cutlass_3x, "the miniature has SM90 kernels only");
    int blocks = -1;
    tensorrt_llm::common::check_cuda_error(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, cutlass::device_kernel<GemmKernel>,
            128 * (GemmKernel::NumLoadWarpGroups + GemmKernel::NumMmaWarpGroups), 0));
    return blocks;
}
} // namespace cutlass_extensions
} // namespace tensorrt_llm
