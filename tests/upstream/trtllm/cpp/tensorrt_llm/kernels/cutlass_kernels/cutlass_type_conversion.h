// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <NvInferRuntime.h>

#include "cutlass/bfloat16.h"
#include "cutlass/float8.h"
#include "cutlass/half.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
template <nvinfer1::DataType>
struct CutlassType
{
    using type = void;
};

template <>
struct CutlassType<nvinfer1::DataType::kHALF>
{
    using type = cutlass::half_t;
};

template <typename T>
struct TllmToCutlassTypeAdapter
{
    using type = T;
};

template <>
struct TllmToCutlassTypeAdapter<half>
{
    using type = cutlass::half_t;
};

#if defined(ENABLE_BF16)
template <>
struct TllmToCutlassTypeAdapter<__nv_bfloat16>
{
    using type = cutlass::bfloat16_t;
};
#endif

#if defined(ENABLE_FP8)
template <>
struct TllmToCutlassTypeAdapter<__nv_fp8_e4m3>
{
    using type = cutlass::float_e4m3_t;
};
#endif
} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
