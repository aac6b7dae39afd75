// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensorrt_llm/common/logger.h"
#include "tensorrt_llm/common/tllmException.h"

// Both come with cuBLAS, which an extracted library does not need: the pipeline has to stand in for them.
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_runtime_api.h>

namespace tensorrt_llm
{
namespace common
{
inline char const* _cudaGetErrorEnum(cudaError_t error)
{
    return cudaGetErrorString(error);
}

inline char const* _cudaGetErrorEnum(cublasStatus_t error)
{
    switch (error)
    {
    case CUBLAS_STATUS_SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case CUBLAS_STATUS_NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case CUBLAS_STATUS_ALLOC_FAILED: return "CUBLAS_STATUS_ALLOC_FAILED";
    case CUBLAS_STATUS_INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case CUBLAS_STATUS_NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "<unknown>";
    }
}

template <typename T>
void check(T result, char const* what, char const* file, int line)
{
    if (result)
    {
        throw TllmException(file, line,
            fmtstr("[TensorRT-LLM][ERROR] CUDA runtime error in %s: %s", what, _cudaGetErrorEnum(result)).c_str());
    }
}

template <typename T>
void check_cuda_error(T result)
{
    check(result, "check_cuda_error", __FILE__, __LINE__);
}

// Of the current device: 90 for Hopper.
inline int getSMVersion()
{
    int device = -1;
    int major = 0;
    int minor = 0;
    check_cuda_error(cudaGetDevice(&device));
    check_cuda_error(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    check_cuda_error(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    return major * 10 + minor;
}
} // namespace common
} // namespace tensorrt_llm
