// SPDX-License-Identifier: Apache-2.0
// The public C++ API: A [m, k] and C [m, n] row-major, B preprocessed.
#pragma once

#include "cutlass_extensions/gemm_configs.h"
#include "cutlass_extensions/weight_only_quant_op.h"

#include <cuda_runtime_api.h>
#include <vector>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
class CutlassFpAIntBGemmRunnerInterface
{
public:
    using Config = tensorrt_llm::cutlass_extensions::CutlassGemmConfig;

    virtual ~CutlassFpAIntBGemmRunnerInterface() = default;

    virtual void gemm(void const* A, void const* B, void const* weight_scales, void const* weight_zero_points,
        void const* biases, float const alpha, void* C, int m, int n, int k, int const group_size, Config gemmConfig,
        char* workspace_ptr, size_t const workspace_bytes, cudaStream_t stream)
        = 0;
    virtual size_t getWorkspaceSize(int const m, int const n, int const k) = 0;
    virtual std::vector<Config> getConfigs() const = 0;
};

template <typename ActivationType, typename WeightType, cutlass::WeightOnlyQuantOp QuantOp,
    typename ScaleZeroType = ActivationType, typename BiasType = ActivationType, typename OutputType = ActivationType>
class CutlassFpAIntBGemmRunner : public CutlassFpAIntBGemmRunnerInterface
{
public:
    void gemm(void const* A, void const* B, void const* weight_scales, void const* weight_zero_points,
        void const* biases, float const alpha, void* C, int m, int n, int k, int const group_size, Config gemmConfig,
        char* workspace_ptr, size_t const workspace_bytes, cudaStream_t stream) override;
    size_t getWorkspaceSize(int const m, int const n, int const k) override;
    std::vector<Config> getConfigs() const override;
};
} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
