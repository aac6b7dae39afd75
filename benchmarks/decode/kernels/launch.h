// Host side of the decode kernels: tensor maps and launch attributes.

#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include "problem.h"

#include <cstddef>

namespace w4a16::decode {

struct Launch {
    const void *a;
    const void *b;
    const void *scales;
    const void *zeros;
    const void *bias;
    void *c;
    int m;
    int n;
    int k;
    int group_size; // K: per column
    cudaStream_t stream;
    Dependence dependence;
    int shares;     // CTAs that share K, wide kernels only
};

struct Config {
    const char *name;
    int rows;
    int tokens;
    int group; // narrow: 32, 64, 128 (and larger); wide: 64 (and larger)
    bool zeros;
    bool wide;
    int ctas_per_sm;
    int stages;
    cudaError_t (*launch)(const Launch &launch);
    const void *kernel;
    int shared_bytes;
    int threads;
};

// 2-D: `width` x `height` bytes, boxes of `box_width` x `box_height`, swizzled by box_width (64 or 128 bytes).
cudaError_t weight_map(CUtensorMap *map, const void *data, int width, int height, int box_width, int box_height);
// 3-D view of [M, K] halves as 64 x M x K / 64, boxes of 64 x `tokens` x `tiles`.
cudaError_t activation_map(CUtensorMap *map, const void *data, int m, int k, int tokens, int tiles);

cudaError_t launch_kernel(const void *kernel, int ctas, int threads, int shared_bytes, const CUtensorMap &weights,
    const CUtensorMap &activations, const Launch &launch);

template <auto kernel, typename Shape>
cudaError_t launch_shape(const Launch &launch) {
    CUtensorMap weights;
    CUtensorMap activations;
    using Ring = typename Shape::Ring;
    if (cudaError_t error = weight_map(&weights, launch.b, launch.k / 2, launch.n, Ring::stage_k / 2, Shape::rows);
        error != cudaSuccess) {
        return error;
    }
    if (cudaError_t error =
            activation_map(&activations, launch.a, launch.m, launch.k, Shape::box_tokens(launch.m), Ring::stage_k / 64);
        error != cudaSuccess) {
        return error;
    }
    const int tiles = (launch.n + Shape::rows - 1) / Shape::rows;
    return launch_kernel(reinterpret_cast<const void *>(kernel), tiles * launch.shares, Shape::threads,
        Shape::shared_bytes, weights, activations, launch);
}

} // namespace w4a16::decode
