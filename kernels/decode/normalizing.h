// The narrow kernel with the norm before it, for a row or a few: every CTA normalises all of them itself, while its first
// weights are on their way, and keeps them in shared memory.  The ring brings weights and scales only.
//
// That is a chain of latencies between the kernel before and the first product, so each thread holds its vectors of a
// row, of the norm's weight and of its bias in registers, all asked for at once, and the code is short: instructions
// that run once a launch have to be fetched, too.  More rows are normalised sooner by a kernel of their own.

#pragma once

#include "narrow.h"
#include "norm.h"

namespace w4a16::decode {

constexpr int vector_halves = 8; // of 16 bytes
constexpr int vectors_of_a_stage = 256 / vector_halves;

template <int row_groups, int row_tiles, int token_tiles, int warps, int group, bool zeros, int ctas_per_sm>
struct NormalizingShape : NarrowShape<row_groups, row_tiles, token_tiles, warps, 0, group, zeros, ctas_per_sm> {
    using Narrow = NarrowShape<row_groups, row_tiles, token_tiles, warps, 0, group, zeros, ctas_per_sm>;
    static_assert(token_tiles == 1 && warps == 8, "1, 2 or 4 rows share the warps");

    static constexpr int vectors = 4; // of each of x, weight and bias, that a thread holds
    static constexpr int rows_bytes = vectors * warps * warp_size * 16; // of all rows at most
    static constexpr int statistics_bytes = 2 * warps * sizeof(float2);
    static constexpr int ring_bytes = shared_bytes_of_a_cta(ctas_per_sm) - rows_bytes - statistics_bytes - copy_alignment;
    static constexpr int fitting = ring_bytes / Ring<Narrow::rows, 0, 256, group, zeros, 1>::stage_bytes;
    using Ring = decode::Ring<Narrow::rows, 0, 256, group, zeros, fitting < 24 ? fitting : 24>;
    static_assert(Ring::stages >= Narrow::sets, "each pair of warps has a stage to begin with");
    static_assert(Narrow::sums_bytes <= Ring::scales_at, "partial sums reuse the stages");

    static constexpr int rows_at = (Ring::bytes + copy_alignment - 1) / copy_alignment * copy_alignment;
    static constexpr int statistics_at = rows_at + rows_bytes;
    static constexpr int shared_bytes = statistics_at + statistics_bytes;
};

// A vector where `there`, else `absent` in every word; without a branch, so that many loads are in flight at once.
__device__ __forceinline__ uint4 load_vector(const __half *from, bool there, std::uint32_t absent) {
    uint4 found;
    asm volatile("{\n.reg .pred p;\n"
                 "setp.ne.u32 p, %5, 0;\n"
                 "mov.u32 %0, %6;\nmov.u32 %1, %6;\nmov.u32 %2, %6;\nmov.u32 %3, %6;\n"
                 "@p ld.global.v4.u32 {%0, %1, %2, %3}, [%4];\n}"
                 : "=&r"(found.x), "=&r"(found.y), "=&r"(found.z), "=&r"(found.w)
                 : "l"(from), "r"(static_cast<std::uint32_t>(there)), "r"(absent)
                 : "memory");
    return found;
}

__device__ __forceinline__ float2 floats_of(std::uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2 &>(pair));
}

// A word of a vector, by a number that is known when the loop around it is unrolled.
__device__ __forceinline__ std::uint32_t &word_of(uint4 &vector, int i) {
    return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// A thread's part of a row.
template <typename Shape>
struct Normalizer {
    static constexpr int vectors = Shape::vectors;
    static constexpr int words = 4; // of a vector

    const Norm &norm;
    float2 *statistics; // [2][warps]
    unsigned char *rows;
    int m;
    int padded_vectors; // of a row, up to the end of the last stage
    int lane;
    int warp;

    int row_warps = Shape::warps >> norm.rows_shift;
    int row = warp / row_warps;
    int first = warp % row_warps * warp_size + lane; // of the row's vectors; the others are `step` apart
    int step = row_warps * warp_size;

    // The norm as normalize_rows.cu computes it; `wait` returns when x, weight and bias may be read.
    template <typename Wait>
    __device__ __forceinline__ void run(Wait wait) const {
        constexpr std::uint32_t ones = 0x3C003C00u;
        const int row_vectors = norm.hidden / vector_halves;
        const __half *const from = norm.x + row * norm.x_stride;
        wait();
        uint4 held[vectors];
        uint4 weight[vectors]; // zeros for columns of the padding, which makes those zeros, too
        uint4 bias[vectors];
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            const int vector = first + v * step;
            const bool inside = row < m && vector < row_vectors;
            held[v] = load_vector(from + vector * vector_halves, inside, 0);
            weight[v] = load_vector(
                norm.weight + vector * vector_halves, inside && norm.weight != nullptr, inside ? ones : 0);
            bias[v] = load_vector(norm.bias + vector * vector_halves, inside && norm.bias != nullptr, 0);
        }
        float2 sums = {0.f, 0.f}; // of values and of their squares
        for_each_vector([&](int v) {
            for_each_of(held[v], [&](float x) { sums = {sums.x + x, fmaf(x, x, sums.y)}; });
        });
        sums = sum_of_row(sums, 0);
        const float mean = norm.rms ? 0.f : sums.x * norm.inverse;
        const float power = sums.y * norm.inverse;
        float variance = fmaf(-mean, mean, power);
        float shift = 0.f; // a normalised value is (x - shift) * factor + offset, times weight, and bias
        float correction = mean;
        // Where the mean is large the squares have lost the deviation, which is summed by itself then.  A mean of four
        // deviations costs a few bits, which can be spared.  The same answer in all of the row's threads; so for NaNs.
        if (!norm.rms && !(variance * 16.f >= power)) {
            float2 deviations = {0.f, 0.f};
            for_each_vector([&](int v) {
                if (first + v * step < row_vectors) { // what the padding deviates does not count
                    for_each_of(held[v], [&](float x) {
                        const float deviation = x - mean;
                        deviations = {deviations.x + deviation, fmaf(deviation, deviation, deviations.y)};
                    });
                }
            });
            deviations = sum_of_row(deviations, 1);
            shift = mean;
            // Their own mean is what rounding left of the first pass.
            correction = deviations.x * norm.inverse;
            variance = fmaf(-correction, correction, deviations.y * norm.inverse);
            variance = variance < 0.f ? 0.f : variance; // not fmaxf, which would make 0 of a NaN
        }
        const float factor = rsqrtf(variance + norm.eps);
        const float offset = -correction * factor;
        for_each_vector([&](int v) {
            const int vector = first + v * step;
            if (row < m && vector < padded_vectors) {
#pragma unroll
                for (int i = 0; i < words; ++i) {
                    const float2 x = floats_of(word_of(held[v], i));
                    const float2 w = floats_of(word_of(weight[v], i));
                    const float2 b = floats_of(word_of(bias[v], i));
                    const __half2 halves = __floats2half2_rn(fmaf(fmaf(x.x - shift, factor, offset), w.x, b.x),
                        fmaf(fmaf(x.y - shift, factor, offset), w.y, b.y));
                    word_of(held[v], i) = reinterpret_cast<const std::uint32_t &>(halves);
                }
                *place(vector) = held[v];
            }
        });
    }

private:
    template <typename Visit>
    static __device__ __forceinline__ void for_each_of(uint4 &vector, Visit visit) {
#pragma unroll
        for (int i = 0; i < words; ++i) {
            const float2 x = floats_of(word_of(vector, i));
            visit(x.x);
            visit(x.y);
        }
    }

    // As many as the row has for its threads; the others' code is not even fetched.
    template <typename Visit>
    __device__ __forceinline__ void for_each_vector(Visit visit) const {
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            if (v * step >= padded_vectors) { // the same in all of the row's threads
                break;
            }
            visit(v);
        }
    }

    // Over the row's threads, in a fixed order; the same bits in each.  Every `turn` has statistics of its own.
    __device__ __forceinline__ float2 sum_of_row(float2 value, int turn) const {
#pragma unroll
        for (int distance = warp_size / 2; distance > 0; distance /= 2) {
            value.x += __shfl_xor_sync(0xffffffffu, value.x, distance);
            value.y += __shfl_xor_sync(0xffffffffu, value.y, distance);
        }
        float2 *const of_warps = statistics + turn * Shape::warps;
        if (lane == 0) {
            of_warps[warp] = value;
        }
        constexpr int first_barrier = 2; // 0 and 1 are for all threads and for all that multiply
        sync_threads(first_barrier + row, row_warps * warp_size);
        float2 total = {0.f, 0.f};
#pragma unroll
        for (int i = 0; i < Shape::warps; ++i) {
            if (i < row_warps) {
                const float2 part = of_warps[row * row_warps + i];
                total = {total.x + part.x, total.y + part.y};
            }
        }
        return total;
    }

    // Where a vector of the row lies: in tiles of 64 columns by m rows, in lines of 128 bytes whose 16-byte chunks are
    // swizzled by the line's number in its stage, as narrow_multiply() reads them.
    __device__ __forceinline__ uint4 *place(int vector) const {
        const int tile = vector / 8;
        const int line_of_stage = tile % 4 * m + row;
        return reinterpret_cast<uint4 *>(rows + (tile * m + row) * 128 + (vector % 8 ^ line_of_stage % 8) * 16);
    }
};

template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::ctas_per_sm)
    normalizing_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap scales,
        const __grid_constant__ CUtensorMap zeros, const Problem problem, const __grid_constant__ Norm norm) {
    using Ring = typename Shape::Ring;
    extern __shared__ __align__(1024) unsigned char shared[];
    const Ring ring{shared_address(shared)};
    const int lane = threadIdx.x % warp_size;
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / warp_size), 0); // makes it uniform
    const int first_row = blockIdx.x * Shape::rows;
    const int blocks = (problem.k + Ring::stage_k - 1) / Ring::stage_k;

    if (problem.dependence == release_early) {
        release_dependents();
    }
    const Source<Ring, Shape::zeros> source{
        ring, {&weights, nullptr, &scales, &zeros}, problem, Work{{first_row, 0, 0}, blocks}, 0};
    if (elect_lane()) {
        ring.init(2 * Shape::row_groups, warp, Shape::threads / warp_size);
        if (warp == Shape::warps) {
            source.prefetch_maps();
        }
    }
    __syncwarp();
    __syncthreads();
    if (warp == Shape::warps) {
        source.feed();
        return;
    }
    source.begin(warp, Shape::warps);

    const Normalizer<Shape> normalizer{norm, reinterpret_cast<float2 *>(shared + Shape::statistics_at),
        shared + Shape::rows_at, problem.m, blocks * vectors_of_a_stage, lane, warp};
    normalizer.run([&] {
        if (problem.dependence != independent) {
            wait_for_dependencies();
        }
    });
    sync_threads(1, Shape::warps * warp_size);

    const std::uint32_t rows = shared_address(shared + Shape::rows_at);
    const int stage_bytes = Ring::stage_k * 2 * problem.m; // of rows
    const int share = warp / Shape::row_groups;
    const int warp_row = warp % Shape::row_groups * (Shape::row_tiles * 16);
    const int half = share % 2;
    const int first_scale_row = half * 128 >> problem.group_shift;
    const int set = share / 2;
    float sum[Shape::row_tiles][Shape::token_tiles][4] = {};
    Cursor<Ring> at(set);
#pragma unroll 1
    for (int block = set; block < blocks; block += Shape::sets) {
        barrier_wait(ring.full(at.fill), at.parity);
        narrow_multiply<Shape>(sum, ring.weights(at.stage), rows + block * stage_bytes, ring.scales(at.stage), half,
            first_scale_row, warp_row, problem.m, lane);
        __syncwarp();
        barrier_arrive_by_warp(ring.empty(at.stage));
        at.advance(Shape::sets);
    }
    narrow_finish<Shape>(sum, shared, problem, first_row, 0, share, warp_row, lane);
}

} // namespace w4a16::decode
