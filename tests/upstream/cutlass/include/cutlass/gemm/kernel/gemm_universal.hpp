// SPDX-License-Identifier: Apache-2.0
// The kernel: what one thread of one block does, callable on the host too, so that it can be checked without a GPU.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/kernel/tile_scheduler.hpp"

namespace cutlass
{
namespace gemm
{
namespace kernel
{
template <class ProblemShape_, class CollectiveMainloop_, class CollectiveEpilogue_, class TileScheduler_,
    class Enable = void>
class GemmUniversal
{
public:
    using CollectiveMainloop = CollectiveMainloop_;
    using CollectiveEpilogue = CollectiveEpilogue_;
    using TileScheduler = TileScheduler_;
    using TileShape = typename CollectiveMainloop::TileShape;
    using ClusterShape = typename CollectiveMainloop::ClusterShape;

    static constexpr int NumLoadWarpGroups = 0;
    static constexpr int NumMmaWarpGroups = 1;
    static constexpr int MaxThreadsPerBlock = 128;
    static constexpr int MinBlocksPerMultiprocessor = 1;

    struct SharedStorage
    {
    };

    // A and B are swapped, as upstream does: the tile's first extent runs over the n columns of the weights.
    struct Params
    {
        int n, m, k;
        typename CollectiveMainloop::Params mainloop;
        typename CollectiveEpilogue::Params epilogue;
    };

    CUTLASS_HOST_DEVICE static void run_thread(Params const& params, int block_n, int block_m, int thread)
    {
        constexpr int kTileN = cute::size<0>(TileShape{});
        constexpr int kTileM = cute::size<1>(TileShape{});
        for (int i = thread; i < kTileN * kTileM; i += MaxThreadsPerBlock)
        {
            int const n = block_n * kTileN + i % kTileN;
            int const m = block_m * kTileM + i / kTileN;
            if (n < params.n && m < params.m)
            {
                float const sum = CollectiveMainloop::dot(params.mainloop, m, n, params.n, params.k);
                CollectiveEpilogue::store(params.epilogue, sum, m, n, params.n);
            }
        }
    }

    CUTLASS_DEVICE void operator()(Params const& params, [[maybe_unused]] char* smem) const
    {
#if defined(__CUDA_ARCH__)
        run_thread(params, int(blockIdx.x), int(blockIdx.y), int(threadIdx.x));
#endif
    }
};
} // namespace kernel
} // namespace gemm
} // namespace cutlass
