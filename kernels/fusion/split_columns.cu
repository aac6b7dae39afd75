// Copies the columns of one product to the outputs that they belong to, 16 bytes at a time.

#include "split_columns.h"

#include "dependency.cuh"

#include <algorithm>

namespace w4a16::fusion {

constexpr int split_threads = 256;
constexpr int vector_halves = 8; // of 16 bytes

__global__ void __launch_bounds__(split_threads) split_columns_kernel(const Split p) {
    release_dependents();
    await_prerequisites();
    const int ends[3] = {p.n[0] / vector_halves, (p.n[0] + p.n[1]) / vector_halves,
        (p.n[0] + p.n[1] + p.n[2]) / vector_halves};
    for (int row = static_cast<int>(blockIdx.x); row < p.m; row += static_cast<int>(gridDim.x)) {
        const uint4 *const from = reinterpret_cast<const uint4 *>(p.x) + static_cast<std::int64_t>(row) * ends[2];
        for (int vector = static_cast<int>(blockIdx.y * split_threads + threadIdx.x); vector < ends[2];
             vector += static_cast<int>(gridDim.y) * split_threads) {
            const uint4 value = from[vector];
            int begin = 0;
#pragma unroll
            for (int i = 0; i < 3; ++i) {
                if (vector >= begin && vector < ends[i]) {
                    reinterpret_cast<uint4 *>(p.c[i])[static_cast<std::int64_t>(row) * (ends[i] - begin) + vector - begin]
                        = value;
                }
                begin = ends[i];
            }
        }
    }
}

void split_columns(const Split &split, int sm_count, CUstream_st *stream) {
    const int vectors = (split.n[0] + split.n[1] + split.n[2]) / vector_halves;
    const int across = std::min((vectors + split_threads - 1) / split_threads, 64);
    const int enough = std::max(1, 16 * sm_count / across);
    const dim3 grid(static_cast<unsigned int>(std::min(split.m, enough)), static_cast<unsigned int>(across));
    launch(split_columns_kernel, grid, split_threads, 0, split.overlap, stream, split);
}

} // namespace w4a16::fusion
