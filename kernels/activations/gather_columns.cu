// Picks columns of activations: act-order weights have their rows sorted, padded ones have more of them.
//
// Never let this kernel trigger programmatic launch completion (griddepcontrol.launch_dependents): what follows it may
// rely on everything before it having ended.

#include "gather_columns.h"

#include <algorithm>

#include <cuda_pipeline.h>
#include <cuda_runtime.h>

namespace w4a16::activations {

constexpr int gather_threads = 256;
constexpr int vector_halves = 8; // of 16 bytes

struct GatherParameters {
    Gather gather;
    int rows;  // that a thread block works on
    int pitch; // halves between staged rows
    bool aligned_columns;
    // columns[j] = j, and x can be read in vectors where they lie inside.
    bool copies_vectors;
};

// How many halves beyond a multiple of 16 bytes a row begins.
inline __device__ int phase_of(const std::uint16_t *row) {
    return static_cast<int>(reinterpret_cast<std::uintptr_t>(row) / sizeof *row % vector_halves);
}

// Copies a row of x to shared memory, to the same phase: all but its ends moves in vectors, past the registers.
inline __device__ void stage_row(const std::uint16_t *row, int count, std::uint16_t *staged) {
    const int thread = threadIdx.x;
    const int head = min((vector_halves - phase_of(row)) % vector_halves, count);
    const int tail = head + (count - head) / vector_halves * vector_halves;
    for (int i = head + thread * vector_halves; i < tail; i += gather_threads * vector_halves) {
        __pipeline_memcpy_async(staged + i, row + i, sizeof(uint4));
    }
    const int end = thread < head ? thread : tail + thread - head;
    if (end < count && thread < 2 * vector_halves) {
        staged[end] = row[end];
    }
}

inline __device__ uint4 vector_of(const std::uint16_t (&values)[vector_halves]) {
    const auto pair = [&](int i) { return values[2 * i] | static_cast<unsigned int>(values[2 * i + 1]) << 16; };
    return make_uint4(pair(0), pair(1), pair(2), pair(3));
}

// The columns for one vector of the output, and which of its bits they fill; column 0 stands where there is none.
struct Columns {
    int at[vector_halves];
    uint4 mask;
};

inline __device__ Columns columns_of(const GatherParameters &p, int vector) {
    const int first = vector * vector_halves;
    Columns found;
    if (p.aligned_columns) {
        const int4 *const from = reinterpret_cast<const int4 *>(p.gather.columns + first);
        const int4 low = __ldg(from);
        const int4 high = __ldg(from + 1);
        found = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}, {}};
    } else {
#pragma unroll
        for (int i = 0; i < vector_halves; ++i) {
            found.at[i] = p.gather.columns == nullptr ? first + i : __ldg(p.gather.columns + first + i);
        }
    }
    std::uint16_t mask[vector_halves];
#pragma unroll
    for (int i = 0; i < vector_halves; ++i) {
        const bool inside = found.at[i] >= 0 && found.at[i] < p.gather.k_in;
        mask[i] = inside ? 0xffff : 0;
        found.at[i] = inside ? found.at[i] : 0;
    }
    found.mask = vector_of(mask);
    return found;
}

inline __device__ uint4 gathered(const std::uint16_t *row, const Columns &columns) {
    std::uint16_t values[vector_halves];
#pragma unroll
    for (int i = 0; i < vector_halves; ++i) {
        values[i] = row[columns.at[i]];
    }
    const uint4 vector = vector_of(values);
    const uint4 &mask = columns.mask;
    return make_uint4(vector.x & mask.x, vector.y & mask.y, vector.z & mask.z, vector.w & mask.w);
}

// `staged`: rows go through shared memory, where picking 2 bytes costs far less than from lines of the L1 cache.  For
// few rows the copy is not worth the wait.
template <bool staged>
__global__ void __launch_bounds__(gather_threads, 4) gather_columns_kernel(const GatherParameters p) {
    extern __shared__ uint4 memory[];
    const Gather &gather = p.gather;
    const int first_row = blockIdx.x * p.rows;
    const int rows = min(p.rows, gather.m - first_row);
    const std::uint16_t *const x = gather.x + first_row * gather.x_stride;
    const auto staged_row = [&](int row) {
        return reinterpret_cast<std::uint16_t *>(memory) + row * p.pitch + phase_of(x + row * gather.x_stride);
    };
    if constexpr (staged) {
        for (int row = 0; row < rows; ++row) {
            stage_row(x + row * gather.x_stride, gather.k_in, staged_row(row));
        }
        __pipeline_commit();
        __pipeline_wait_prior(0);
        __syncthreads();
    }
    const int vectors = gather.k_out / vector_halves;
    uint4 *const out = reinterpret_cast<uint4 *>(gather.out) + std::int64_t{first_row} * vectors;
    for (int vector = blockIdx.y * blockDim.x + threadIdx.x; vector < vectors; vector += gridDim.y * blockDim.x) {
        const Columns columns = columns_of(p, vector);
        const bool copies = !staged && p.copies_vectors && (vector + 1) * vector_halves <= gather.k_in;
#pragma unroll 2
        for (int row = 0; row < rows; ++row) {
            const std::uint16_t *const from = staged ? staged_row(row) : x + row * gather.x_stride;
            out[std::int64_t{row} * vectors + vector]
                = copies ? __ldg(reinterpret_cast<const uint4 *>(from) + vector) : gathered(from, columns);
        }
    }
}

void gather_columns(const Gather &gather, int sm_count, CUstream_st *stream) {
    const auto aligned = [](const void *pointer) {
        return reinterpret_cast<std::uintptr_t>(pointer) % sizeof(uint4) == 0;
    };
    GatherParameters parameters{};
    parameters.gather = gather;
    parameters.aligned_columns = gather.columns != nullptr && aligned(gather.columns);
    parameters.copies_vectors
        = gather.columns == nullptr && aligned(gather.x) && gather.x_stride % vector_halves == 0;
    const std::int64_t vectors = gather.k_out / vector_halves;
    const auto blocks_of = [&](std::int64_t rows) { return (gather.m + rows - 1) / rows; };

    // A staged row has room for its phase.
    const std::int64_t pitch = (std::int64_t{gather.k_in} + 2 * vector_halves - 1) / vector_halves * vector_halves;
    const std::int64_t pitch_bytes = pitch * static_cast<std::int64_t>(sizeof(std::uint16_t));
    constexpr int few_rows = 32;
    if (gather.columns != nullptr && gather.m > few_rows) {
        int device = 0;
        int most_bytes = 0;
        if (cudaGetDevice(&device) != cudaSuccess
            || cudaDeviceGetAttribute(&most_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
            return;
        }
        if (pitch_bytes <= most_bytes) {
            // The more rows, the fewer reads of `columns`; but let two blocks fit on an SM, and have work for all SMs.
            int rows = 4;
            while (rows > 1 && (rows * pitch_bytes > most_bytes / 2 || blocks_of(rows) < 2 * sm_count)) {
                rows /= 2;
            }
            parameters.rows = rows;
            parameters.pitch = static_cast<int>(pitch);
            // Always the same value: threads that launch at the same time set no limit that is too low for another.
            if (cudaFuncSetAttribute(gather_columns_kernel<true>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                    most_bytes) != cudaSuccess) {
                return;
            }
            gather_columns_kernel<true><<<static_cast<unsigned int>(blocks_of(rows)), gather_threads,
                static_cast<std::size_t>(rows * pitch_bytes), stream>>>(parameters);
            return;
        }
    }

    // One row is over sooner if many SMs take part of it.
    const int threads = gather.m <= few_rows ? 64 : gather_threads;
    const std::int64_t across = std::min<std::int64_t>((vectors + threads - 1) / threads, 65535);
    std::int64_t rows = 1;
    while (rows < 8 && blocks_of(2 * rows) * across >= 8 * sm_count) {
        rows *= 2;
    }
    parameters.rows = static_cast<int>(rows);
    const dim3 grid(static_cast<unsigned int>(blocks_of(rows)), static_cast<unsigned int>(across));
    gather_columns_kernel<false><<<grid, static_cast<unsigned int>(threads), 0, stream>>>(parameters);
}

} // namespace w4a16::activations
