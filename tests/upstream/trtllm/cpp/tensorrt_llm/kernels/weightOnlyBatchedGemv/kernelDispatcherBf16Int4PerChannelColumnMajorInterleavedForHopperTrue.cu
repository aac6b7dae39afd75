// SPDX-License-Identifier: Apache-2.0
#include "tensorrt_llm/kernels/weightOnlyBatchedGemv/kernelDispatcher.h"

namespace tensorrt_llm
{
namespace kernels
{
namespace weight_only
{
INSTANTIATE_WEIGHT_ONLY_CUDA_DISPATCHERS(
    KernelType::BF16Int4PerChannel, BF16DetailsA, Int4DetailsW, ColumnMajorInterleavedForHopper, true, 64);
} // namespace weight_only
} // namespace kernels
} // namespace tensorrt_llm
