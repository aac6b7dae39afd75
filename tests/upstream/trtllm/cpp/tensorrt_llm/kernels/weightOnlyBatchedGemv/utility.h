// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass_extensions/gemm/kernel/mixed_gemm_B_layout.h"
#include "tensorrt_llm/kernels/weightOnlyBatchedGemv/details.h"

namespace tensorrt_llm
{
namespace kernels
{
namespace weight_only
{
// The weight of a row and column, dequantised and rounded as the activations' type has it.
template <typename Details, typename TypeA>
__device__ __forceinline__ TypeA dequantize(uint8_t const* weight, int row, int column, int k, TypeA scale, TypeA zero)
{
    static_assert(Details::kUseInterleavedConverter, "weights are stored interleaved and biased");
    using Layout = cutlass::gemm::kernel::PackedLayout<Details::TypeDetailsW::kElemBits,
        Details::TypeDetailsA::kElemBits>;
    int const q = Layout::load(reinterpret_cast<uint32_t const*>(weight), row, column, k, Details::kInterleave);
    return __hfma(TypeA(float(q - Layout::kZeroPoint)), scale, zero);
}

// Of all threads of a block; every thread gets it.
template <int Threads>
__device__ __forceinline__ float block_sum(float value)
{
    static_assert(Threads % 32 == 0);
    __shared__ float partial[Threads / 32];
    for (int step = 16; step > 0; step /= 2)
    {
        value += __shfl_xor_sync(~0u, value, step);
    }
    if (threadIdx.x % 32 == 0)
    {
        partial[threadIdx.x / 32] = value;
    }
    __syncthreads();
    value = 0.f;
    for (float const part : partial)
    {
        value += part;
    }
    __syncthreads(); // before the next sum overwrites the parts
    return value;
}
} // namespace weight_only
} // namespace kernels
} // namespace tensorrt_llm
