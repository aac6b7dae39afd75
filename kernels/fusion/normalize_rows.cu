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

struct Pair {
    float first;
    float second;
};

inline __device__ Pair warp_sum(Pair value) {
#pragma unroll
    for (int distance = warp_size / 2; distance > 0; distance /= 2) {
        value.first += __shfl_xor_sync(0xffffffff, value.first, distance);
        value.second += __shfl_xor_sync(0xffffffff, value.second, distance);
    }
    return value;
}

// The sums over the thread block, the same bits in every thread.  `partial` is used by one call.
inline __device__ Pair block_sum(Pair value, Pair (&partial)[most_threads / warp_size]) {
    value = warp_sum(value);
    if (threadIdx.x % warp_size == 0) {
        partial[threadIdx.x / warp_size] = value;
    }
    __syncthreads();
    const int warps = static_cast<int>(blockDim.x) / warp_size;
    Pair sum{0, 0};
#pragma unroll
    for (int warp = 0; warp < most_threads / warp_size; ++warp) {
        if (warp < warps) {
            sum.first += partial[warp].first;
            sum.second += partial[warp].second;
        }
    }
    return sum;
}

struct Halves {
    __half2 pairs[vector_halves / 2];
};

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
    Halves found;
    memcpy(&found, &bits, sizeof found);
    return found;
}

inline __device__ uint4 bits_of(const Halves &halves) {
    uint4 bits;
    memcpy(&bits, &halves, sizeof bits);
    return bits;
}

// Calls `visit` with each of the eight values that is inside the row.
template <bool aligned, typename Visit>
inline __device__ void for_each(const Halves &halves, int first, int count, Visit visit) {
    if (aligned && first >= count) {
        return;
    }
#pragma unroll
    for (int i = 0; i < vector_halves / 2; ++i) {
        const float2 pair = __half22float2(halves.pairs[i]);
        if (aligned || first + 2 * i < count) {
            visit(pair.x);
        }
        if (aligned || first + 2 * i + 1 < count) {
            visit(pair.y);
        }
    }
}

// `aligned`: rows of x, weight and bias can be read in vectors.  A thread holds `vectors` of them.
template <int vectors, bool aligned>
__global__ void __launch_bounds__(most_threads) normalize_rows_kernel(const Normalization p) {
    static_assert(vectors <= most_vectors, "no row is as long");
    // The kernel that follows reads its weights meanwhile, and waits for all of this one before it reads `out`.
    if (!p.release_late) {
        release_dependents();
    }
    await_prerequisites();
    if (p.release_late) {
        release_dependents();
    }
    extern __shared__ uint4 gathered_row[];
    __shared__ Pair partial[2][most_threads / warp_size];
    const int threads = static_cast<int>(blockDim.x);
    const auto first_of = [&](int vector) {
        return (static_cast<int>(threadIdx.x) + vector * threads) * vector_halves;
    };

    const std::uint16_t *const row = p.x + blockIdx.x * p.x_stride;
    Halves held[vectors];
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        held[v] = load<aligned>(row, first_of(v), p.hidden);
    }
    // Asked for along with the rows, where registers allow: else another latency follows the statistics.
    constexpr bool ahead = vectors <= 2;
    Halves weights[vectors];
    Halves biases[vectors];
    const auto load_affine = [&](int v) {
        weights[v] = biases[v] = Halves{};
        if (p.weight != nullptr) {
            weights[v] = load<aligned>(p.weight, first_of(v), p.hidden);
        }
        if (p.bias != nullptr) {
            biases[v] = load<aligned>(p.bias, first_of(v), p.hidden);
        }
    };
    if constexpr (ahead) {
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            load_affine(v);
        }
    }
    const float count = static_cast<float>(p.hidden);
    float shift = 0; // what is subtracted from x: the mean as far as the first pass knows it, and its correction
    float correction = 0;
    float variance = 0;
    if (p.rms) {
        Pair sums{0, 0};
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            for_each<aligned>(held[v], first_of(v), p.hidden, [&](float x) { sums.first += x * x; });
        }
        variance = block_sum(sums, partial[0]).first / count;
    } else {
        Pair sums{0, 0};
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            for_each<aligned>(held[v], first_of(v), p.hidden, [&](float x) { sums.first += x; });
        }
        shift = block_sum(sums, partial[0]).first / count;
        sums = {0, 0};
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            for_each<aligned>(held[v], first_of(v), p.hidden, [&](float x) {
                const float deviation = x - shift;
                sums.first += deviation;
                sums.second += deviation * deviation;
            });
        }
        sums = block_sum(sums, partial[1]);
        // The deviations' own mean is what rounding left of the first pass: far below the deviation, if there is one.
        correction = sums.first / count;
        variance = fmaxf(sums.second / count - correction * correction, 0.0f);
        // fmaxf would make 0 of a NaN.
        variance = isnan(sums.second) ? sums.second : variance;
    }
    const float factor = rsqrtf(variance + p.eps);

    const auto normalized = [&](float x, float weight, float bias) {
        return fmaf((x - shift - correction) * factor, weight, bias);
    };
    uint4 *const out = reinterpret_cast<uint4 *>(p.out + static_cast<std::int64_t>(blockIdx.x) * p.k);
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
        const int first = first_of(v);
        const bool gathers = p.columns != nullptr;
        if (first >= (gathers ? p.hidden : p.k)) {
            continue;
        }
        if constexpr (!ahead) {
            load_affine(v);
        }
        Halves result;
#pragma unroll
        for (int i = 0; i < vector_halves / 2; ++i) {
            const float2 x = __half22float2(held[v].pairs[i]);
            const float2 w = p.weight != nullptr ? __half22float2(weights[v].pairs[i]) : make_float2(1, 1);
            const float2 b = __half22float2(biases[v].pairs[i]);
            // Columns that only the padded K has are 0, whatever the row holds.
            const float low = first + 2 * i < p.hidden ? normalized(x.x, w.x, b.x) : 0.0f;
            const float high = first + 2 * i + 1 < p.hidden ? normalized(x.y, w.y, b.y) : 0.0f;
            result.pairs[i] = __floats2half2_rn(low, high);
        }
        (gathers ? gathered_row : out)[first / vector_halves] = bits_of(result);
    }
    if (p.columns == nullptr) {
        return;
    }
    __syncthreads();
    const std::uint16_t *const from = reinterpret_cast<const std::uint16_t *>(gathered_row);
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
    // Few rows are over sooner if many threads share each; many rows keep all SMs busy as they are.
    const int enough_threads = n.m <= 2 * sm_count ? 512 : 256;
    int vectors = 1;
    while (vectors < most_vectors && (row_vectors + vectors - 1) / vectors > enough_threads) {
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
