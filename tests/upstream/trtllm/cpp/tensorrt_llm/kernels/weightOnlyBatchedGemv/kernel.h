// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensorrt_llm/kernels/weightOnlyBatchedGemv/common.h"
#include "tensorrt_llm/kernels/weightOnlyBatchedGemv/utility.h"

namespace tensorrt_llm
{
namespace kernels
{
namespace weight_only
{
// act [m, k], act_scale [k], weight [k, n] preprocessed, scales and zeros [k / GroupSize, n] ([n] if GroupSize is 0),
// bias [n], out [m, n].
template <typename Details, int CtaM, int CtaN, int Threads, int GroupSize, bool EnableActScale, bool EnableZero,
    bool EnableBias, bool ApplyAlphaInAdvance, typename TypeA = typename Details::TypeDetailsA::Type>
__global__ void kernel(TypeA* act, TypeA* act_scale, uint8_t* weight, TypeA* scales, TypeA* zeros, TypeA* bias,
    TypeA* out, float alpha, int m, int n, int k)
{
    static_assert(CtaN % 2 == 0);
    constexpr int kColumns = CtaN * Details::kInterleave;
    for (int i = 0; i < CtaM * kColumns; ++i)
    {
        int const row = blockIdx.x * CtaM + i / kColumns;
        int const column = blockIdx.y * kColumns + i % kColumns;
        float sum = 0.f;
        for (int at = threadIdx.x; at < k; at += Threads)
        {
            int const group = GroupSize == 0 ? 0 : at / GroupSize;
            TypeA scale = scales[group * n + column];
            TypeA zero = EnableZero ? zeros[group * n + column] : TypeA(0.f);
            if constexpr (ApplyAlphaInAdvance)
            {
                scale = TypeA(float(scale) * alpha);
                zero = TypeA(float(zero) * alpha);
            }
            TypeA a = act[row * k + at];
            if constexpr (EnableActScale)
            {
                a = __hmul(a, act_scale[at]);
            }
            sum += float(a) * float(dequantize<Details>(weight, at, column, k, scale, zero));
        }
        sum = block_sum<Threads>(sum);
        if (threadIdx.x == 0)
        {
            float const offset = EnableBias ? float(bias[column]) : 0.f;
            out[row * n + column] = TypeA((ApplyAlphaInAdvance ? 1.f : alpha) * sum + offset);
        }
    }
}

template <typename Details, int CtaM, int CtaN, int Threads, int GroupSize, bool EnableActScale, bool EnableZero,
    bool EnableBias, bool ApplyAlphaInAdvance>
void exec_kernel(Params& params, cudaStream_t s)
{
    using T = typename Details::TypeDetailsA::Type;
    if (params.m % CtaM || params.n % (CtaN * Details::kInterleave))
    {
        throw std::runtime_error("launch failed");
    }
    dim3 const grid(params.m / CtaM, params.n / (CtaN * Details::kInterleave));
    kernel<Details, CtaM, CtaN, Threads, GroupSize, EnableActScale, EnableZero, EnableBias, ApplyAlphaInAdvance>
        <<<grid, Threads, 0, s>>>(static_cast<T*>(params.act), static_cast<T*>(params.act_scale),
            static_cast<uint8_t*>(params.weight), static_cast<T*>(params.scales), static_cast<T*>(params.zeros),
            static_cast<T*>(params.bias), static_cast<T*>(params.out), params.alpha, params.m, params.n, params.k);
}
} // namespace weight_only
} // namespace kernels
} // namespace tensorrt_llm
