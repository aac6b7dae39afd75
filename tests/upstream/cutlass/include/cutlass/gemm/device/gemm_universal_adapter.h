// SPDX-License-Identifier: Apache-2.0
// Host side of a kernel: checks, workspace, launch.
#pragma once

#include "cutlass/device_kernel.h"

#include <cuda_runtime.h>

namespace cutlass
{
namespace gemm
{
namespace device
{
template <class GemmKernel>
class GemmUniversalAdapter
{
public:
    using Arguments = typename GemmKernel::Params;

    static Status can_implement(Arguments const& args)
    {
        bool const aligned = args.n % 8 == 0 && args.k % cute::size<2>(typename GemmKernel::TileShape{}) == 0;
        return aligned ? Status::kSuccess : Status::kErrorMisalignedOperand;
    }

    static size_t get_workspace_size(Arguments const& args)
    {
        dim3 const grid = grid_shape(args);
        return GemmKernel::TileScheduler::kNeedsWorkspace ? size_t(grid.x) * grid.y * sizeof(int) : 0;
    }

    Status initialize(Arguments const& args, void* workspace, cudaStream_t stream)
    {
        params_ = args;
        size_t const bytes = get_workspace_size(args);
        if (bytes == 0)
        {
            return Status::kSuccess;
        }
        if (workspace == nullptr)
        {
            return Status::kErrorWorkspaceNull;
        }
        return cudaMemsetAsync(workspace, 0, bytes, stream) == cudaSuccess ? Status::kSuccess : Status::kErrorInternal;
    }

    Status run(cudaStream_t stream)
    {
        cudaLaunchAttribute cluster{};
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = cute::size<0>(typename GemmKernel::ClusterShape{});
        cluster.val.clusterDim.y = cute::size<1>(typename GemmKernel::ClusterShape{});
        cluster.val.clusterDim.z = 1;
        cudaLaunchConfig_t config{};
        config.gridDim = grid_shape(params_);
        config.blockDim = dim3(GemmKernel::MaxThreadsPerBlock);
        config.stream = stream;
        config.attrs = &cluster;
        config.numAttrs = 1;
        cudaError_t const result = cudaLaunchKernelEx(&config, device_kernel<GemmKernel>, params_);
        return result == cudaSuccess ? Status::kSuccess : Status::kErrorInternal;
    }

private:
    // Whole clusters only: blocks past the edge find nothing to do.
    static dim3 grid_shape(Arguments const& args)
    {
        constexpr int kClusterN = cute::size<0>(typename GemmKernel::ClusterShape{});
        constexpr int kClusterM = cute::size<1>(typename GemmKernel::ClusterShape{});
        constexpr int kTileN = cute::size<0>(typename GemmKernel::TileShape{});
        constexpr int kTileM = cute::size<1>(typename GemmKernel::TileShape{});
        return dim3(ceil_div(args.n, kTileN * kClusterN) * kClusterN, ceil_div(args.m, kTileM * kClusterM) * kClusterM);
    }

    Arguments params_{};
};
} // namespace device
} // namespace gemm
} // namespace cutlass
