// LayerNorm and RMSNorm: a thread block holds a row in registers, and reads it once.

#include "normalize_rows.h"

#include "dependency.cuh"

#include <cstring>

#include <cuda_fp16.h>

namespace w4a16::fusion {

constexpr int most_threads = 1024;
constexpr int warp_size = 32;
constexpr int vector_halves = 8; // of 16 bytes
constexpr int most_vectors = 4;  // that a thread holds
static_assert(most_vectors * vector_halves * most_threads == most_normalized_columns, "the longest row fills a block");

// A block runs every instruction but a few once: what it takes is fetching them, so there are to be few.

struct Pair {
    float first;
    float second;
};

// Over all lanes, the same bits in each.
inline __device__ float warp_sum(float value) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        value += __shfl_xor_sync(0xffffffff, value, distance);
    }
    return value;
}

inline __device__ Pair warp_sum(Pair value) {
    return {warp_sum(value.first), warp_sum(value.second)};
}

// The sums over the thread block, the same bits in every thread.  `partial` is used by one call.
template <typename Value>
inline __device__ Value block_sum(Value value, Value (&partial)[most_threads / warp_size]) {
    const unsigned int lane = threadIdx.x % warp_size;
    value = warp_sum(value);
    if (lane == 0) {
        partial[threadIdx.x / warp_size] = value;
    }
    __syncthreads();
    return warp_sum(lane < blockDim.x / warp_size ? partial[lane] : Value{});
}

struct Halves {
    __half2 pairs[vector_halves / 2];
};

inline __device__ Halves halves_of(const uint4 &bits) {
    Halves halves;
    memcpy(&halves, &bits, sizeof halves);
    return halves;
}

inline __device__ uint4 bits_of(const Halves &halves) {
    uint4 bits;
    memcpy(&bits, &halves, sizeof bits);
    return bits;
}

// Eight halves from `first` on; zeros from `count` on.
template <bool aligned>
inline __device__ Halves load(const std::uint16_t *row, int first, int count) {
    uint4 bits{};
    if constexpr (aligned) { // `count` is a multiple of 8
        if (first < count) {
            bits = *reinterpret_cast<const uint4 *>(row + first);
        }
    } else {
        unsigned int values[vector_halves];
#pragma unroll
        for (int i = 0; i < vector_halves; ++i) {
            values[i] = first + i < count ? row[first + i] : 0;
        }
        bits = make_uint4(values[0] | values[1] << 16, values[2] | values[3] << 16, values[4] | values[5] << 16,
            values[6] | values[7] << 16);
    }
    return halves_of(bits);
}

// `aligned`: rows of x, weight and bias can be read in vectors, which are inside the row or outside as a whole.  A thread
// holds `vectors` of them.
template <int vectors, bool aligned>
__global__ void __launch_bounds__(most_threads) normalize_rows_kernel(const Normalization p) {
    static_assert(vectors <= most_vectors, "no row is as long");
    extern __shared__ uint4 gathered_row[];
    __shared__ float partial_sums[most_threads / warp_size];
    __shared__ Pair partial_moments[most_threads / warp_size];
    const int threads = static_cast<int>(blockDim.x);
    const auto first_of = [&](int vector) {
        return (static_cast<int>(threadIdx.x) + vector * threads) * vector_halves;
    };
    const auto inside = [&](int vector, int i) { return first_of(vector) + (aligned ? 0 : i) < p.hidden; };
    const float per_column = 1.0f / static_cast<float>(p.hidden);

    const std::uint16_t *const row = p.x + blockIdx.x * p.x_stride;

    // The kernel that follows reads its weights meanwhile, and waits for all of this one before it reads `out`.
    release_dependents();
    if constexpr (aligned) {
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            for (const std::uint16_t *const from : {row, p.weight, p.bias}) {
                if (from != nullptr && first_of(v) < p.hidden) {
                    prefetch(from + first_of(v));
                }
            }
        }
    }
    await_prerequisites();

    // Asked for along with the rows, where registers allow: else another latency follows the statistics.
    constexpr bool ahead = vectors <= 2;
    Halves weights[vectors];
    Halves biases[vectors];
    const auto load_affine = [&](int v) {
        constexpr unsigned int ones = 0x3c003c00;
        biases[v] = load<aligned>(p.bias, first_of(v), p.bias != nullptr ? p.hidden : 0);
        weights[v] = halves_of(make_uint4(ones, ones, ones, ones));
        if (p.weight != nullptr) {
            weights[v] = load<aligned>(p.weight, first_of(v), p.hidden);
        }
    };
    if constexpr (ahead) {
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            load_affine(v);
        }
    }
    Halves held[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        held[v] = load<aligned>(row, first_of(v), p.hidden);
    }

    float values[vectors][vector_halves]; // outside the row 0
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
#pragma unroll
        for (int i = 0; i < vector_halves / 2; ++i) {
            const float2 pair = __half22float2(held[v].pairs[i]);
            values[v][2 * i] = pair.x;
            values[v][2 * i + 1] = pair.y;
        }
    }
    if (!p.rms) {
        float sum = 0;
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
#pragma unroll
            for (const float value : values[v]) {
                sum += value;
            }
        }
        const float mean = block_sum(sum, partial_sums) * per_column;
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
#pragma unroll
            for (int i = 0; i < vector_halves; ++i) {
                values[v][i] -= inside(v, i) ? mean : 0.0f;
            }
        }
    }
    Pair moments{0, 0};
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
#pragma unroll
        for (const float value : values[v]) {
            moments.first += value;
            moments.second = fmaf(value, value, moments.second);
        }
    }
    moments = block_sum(moments, partial_moments);
    // The deviations' own mean is what rounding left of the first pass: far below the deviation, if there is one.
    const float rest = p.rms ? 0.0f : moments.first * per_column;
    const float variance = fmaf(moments.second, per_column, -rest * rest);
    const float factor = rsqrtf((variance < 0 ? 0.0f : variance) + p.eps); // a NaN stays one
    const float offset = -rest * factor;
    // Columns that only the padded K has are 0, whatever the row holds.
    const auto normalized = [&](int v, int i) {
        return fmaf(values[v][i], inside(v, i) ? factor : 0.0f, inside(v, i) ? offset : 0.0f);
    };

    uint4 *const out = reinterpret_cast<uint4 *>(p.out + static_cast<std::int64_t>(blockIdx.x) * p.k);
    const bool gathers = p.columns != nullptr;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        const int first = first_of(v);
        if (first >= (gathers ? p.hidden : p.k)) {
            continue;
        }
        if constexpr (!ahead) {
            load_affine(v);
        }
        Halves result;
#pragma unroll
        for (int i = 0; i < vector_halves / 2; ++i) {
            const float2 w = __half22float2(weights[v].pairs[i]);
            const float2 b = __half22float2(biases[v].pairs[i]);
            const float low = fmaf(normalized(v, 2 * i), w.x, b.x);
            const float high = fmaf(normalized(v, 2 * i + 1), w.y, b.y);
            result.pairs[i] = __floats2half2_rn(low, high);
        }
        (gathers ? gathered_row : out)[first / vector_halves] = bits_of(result);
    }
    if (!gathers) {
        return;
    }
    __syncthreads();
    const std::uint16_t *const from = reinterpret_cast<const std::uint16_t *>(gathered_row);
#pragma unroll 1
    for (int vector = static_cast<int>(threadIdx.x); vector < p.k / vector_halves; vector += threads) {
        const int4 *const columns = reinterpret_cast<const int4 *>(p.columns) + 2 * vector;
        const int4 low = columns[0];
        const int4 high = columns[1];
        const auto value = [&](int column) -> unsigned int {
            return column >= 0 && column < p.hidden ? from[column] : 0;
        };
        out[vector] = make_uint4(value(low.x) | value(low.y) << 16, value(low.z) | value(low.w) << 16,
            value(high.x) | value(high.y) << 16, value(high.z) | value(high.w) << 16);
    }
}

using Kernel = void (*)(Normalization);

template <bool aligned>
Kernel kernel_for(int vectors) {
    switch (vectors) {
    case 1:
        return normalize_rows_kernel<1, aligned>;
    case 2:
        return normalize_rows_kernel<2, aligned>;
    default:
        return normalize_rows_kernel<4, aligned>;
    }
}

void normalize_rows(const Normalization &normalization, int sm_count, CUstream_st *stream) {
    const Normalization &n = normalization;
    const auto vectored = [](const void *pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
    const bool aligned = n.hidden % vector_halves == 0 && n.x_stride % vector_halves == 0 && vectored(n.x)
        && vectored(n.weight) && vectored(n.bias);
    const int row_vectors = n.k / vector_halves;
    // Warps run the same instructions for a row, so few of them are over soonest; but with four vectors a thread there are no
    // registers to ask for the weights ahead, which only matters where few rows leave nothing else to run meanwhile.
    constexpr int enough_threads = 256;
    const int enough_vectors = n.m <= 2 * sm_count ? 2 : most_vectors;
    int vectors = 1;
    while (row_vectors > vectors * (vectors < enough_vectors ? enough_threads : most_threads)) {
        vectors *= 2;
    }
    const int threads = (row_vectors + vectors - 1) / vectors;
    const unsigned int rounded = static_cast<unsigned int>((threads + warp_size - 1) / warp_size * warp_size);
    const std::size_t shared_bytes
        = n.columns == nullptr ? 0 : static_cast<std::size_t>((n.hidden + 7) / vector_halves) * sizeof(uint4);
    const Kernel kernel = aligned ? kernel_for<true>(vectors) : kernel_for<false>(vectors);
    constexpr std::size_t without_asking = 48 * 1024 - 1024; // less what the kernel has by itself
    if (shared_bytes > without_asking) {
        // Always the same value: threads that launch at the same time set no limit that is too low for another.
        constexpr int most_bytes = most_normalized_columns * 2;
        if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_bytes) != cudaSuccess) {
            return;
        }
    }
    launch(kernel, dim3(static_cast<unsigned int>(n.m)), rounded, shared_bytes, n.overlap, stream, n);
}

} // namespace w4a16::fusion
