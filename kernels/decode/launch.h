// Host side of the decode kernels: what is known of an instantiation, and how it is launched.

#pragma once

#include "norm.h"
#include "problem.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstddef>
#include <cstdint>

namespace w4a16::decode {

using Function = void (*)(
    CUtensorMap weights, CUtensorMap activations, CUtensorMap scales, CUtensorMap zeros, Problem problem);

// One instantiation.
struct Kernel {
    Function function; // null: there is none
    int rows;          // of a CTA's tile: columns of W
    int tokens;
    int stage_k;
    int most_shares; // of K, that CTAs of a cluster can have
    int streams;     // CTAs an SM that share all tiles evenly, by way of a workspace; 0: each has one tile, or a share
    int shared_bytes;
    int threads;
    bool small_boxes;                     // with M below `tokens`, boxes of activations have M rows
    std::atomic<std::uint64_t> *prepared; // bit d: it may use its shared memory on device d
};

using NormalizingFunction
    = void (*)(CUtensorMap weights, CUtensorMap scales, CUtensorMap zeros, Problem problem, Norm norm);

// One instantiation that normalises its activations.
struct NormalizingKernel {
    NormalizingFunction function; // null: there is none
    Kernel shape;                 // without a function
    int most_halves;              // that its threads hold: of all rows, M rounded up to a power of two
};

template <auto function>
inline std::atomic<std::uint64_t> prepared_devices{0};

// In a unit that nvcc compiles.
template <typename Shape, Function function>
constexpr Kernel kernel_of() {
    return {function, Shape::rows, Shape::tokens, Shape::Ring::stage_k, Shape::most_shares, Shape::streams,
        Shape::shared_bytes, Shape::threads, Shape::small_boxes, &prepared_devices<function>};
}

template <typename Shape, NormalizingFunction function>
constexpr NormalizingKernel normalizing_kernel_of() {
    Kernel shape = kernel_of<Shape, nullptr>();
    shape.prepared = &prepared_devices<function>;
    return {function, shape, Shape::rows_bytes / 2};
}

struct Launch {
    const void *a;
    const void *b;
    const void *scales;
    const void *zeros;
    const void *bias;
    void *c[3]; // with their ends: see Problem
    int ends[3];
    int m;
    int n;
    int k;
    int group_size; // a power of two from 32 on, or K: one group over all of it
    cudaStream_t stream;
    Dependence dependence;
    int shares;       // CTAs of a cluster, which share K
    bool alone_on_sm; // no other CTA shares its SM
    void *workspace;
    int sm_count;
};

// Of a kernel that streams: whether it can count the stages.
bool streams_all(const Kernel &kernel, int m, int n, int k);

// Of a launch.
std::size_t workspace_bytes(const Kernel &kernel, int m, int n, int k, int sm_count);

// On the current device.  Allocates nothing and waits for nothing.
cudaError_t launch(const Kernel &kernel, const Launch &launch);

// Whether a kernel that normalises takes m rows.
bool fits(const NormalizingKernel &kernel, int m, int k);

// The product of rows that it normalises, in place of launch.a.  They fit.
cudaError_t launch_normalizing(const NormalizingKernel &kernel, const Launch &launch, const Norm &norm);

// ---- What the library holds ----

constexpr int group_classes = 3; // groups of 32, of 64, and larger ones

// The kernels of one tactic.
struct Kernels {
    Kernel of[group_classes][2]; // by group class and whether there are zeros
    NormalizingKernel normalizing[group_classes][2] = {};

    static int class_of(int group_size) { return group_size < 64 ? 0 : group_size < 128 ? 1 : 2; }
    const Kernel &of_group(int group_size, bool zeros) const { return of[class_of(group_size)][zeros ? 1 : 0]; }
    const NormalizingKernel &normalizing_of_group(int group_size, bool zeros) const {
        return normalizing[class_of(group_size)][zeros ? 1 : 0];
    }
    // Any of them: their tiles are the same.
    const Kernel &first() const { return of[0][0].function != nullptr ? of[0][0] : of[2][0]; }
};

} // namespace w4a16::decode
