// The narrow kernel with the norm before it: every CTA normalises all rows of activations itself, while its first
// weights are on their way, and keeps them in shared memory.  The ring brings weights and scales only.
//
// Rows are held in registers from the moment they arrive until they are normalised: in `row_sets` sets, each of 8 / S
// rows that are cut into S segments, so that the 8 parts of a set are what the 8 groups of four lanes of every warp
// hold.  That is also the form of both operands of mma.sync: words of the parts as its first one, half of them in the
// upper rows and half in the lower, give sums with ones as the second, and with either half sums of squares on that
// half's diagonal.
//
// A variance of such sums is good where the mean is not far larger than the deviation.  Rows for which it is are summed
// again, as deviations from the mean, in FP32.

#pragma once

#include "narrow.h"
#include "norm.h"

namespace w4a16::decode {

constexpr int vector_halves = 8; // of 16 bytes
constexpr int vectors_of_a_stage = 256 / vector_halves;
constexpr int parts_of_a_set = 8;
constexpr int quad = 4; // lanes that hold a part

template <int row_groups, int row_tiles, int token_tiles, int warps, int group, bool zeros, int ctas_per_sm>
struct NormalizingShape : NarrowShape<row_groups, row_tiles, token_tiles, warps, 0, group, zeros, ctas_per_sm> {
    using Narrow = NarrowShape<row_groups, row_tiles, token_tiles, warps, 0, group, zeros, ctas_per_sm>;

    // What a thread holds of rows: as much as its registers allow.
    static constexpr int row_sets = ctas_per_sm == 1 ? 4 : 2;
    static constexpr int vectors = (32 + warps - 1) / warps; // of each set
    static_assert(warps <= 8, "slots of statistics");

    // Sums of each part by each warp: of values, and of deviations.
    static constexpr int statistics_bytes = row_sets * parts_of_a_set * 8 * sizeof(float2);
    // Room that stages leave to rows: for 8 of 8192 or 16 of 4096; with two CTAs an SM for 4 of 4096 in each.
    static constexpr int reserved_bytes = (ctas_per_sm == 1 ? 128 : 32) * 1024;
    static constexpr int ring_bytes
        = shared_bytes_of_a_cta(ctas_per_sm) - reserved_bytes - 2 * statistics_bytes - copy_alignment;
    static constexpr int fitting = ring_bytes / Ring<Narrow::rows, 0, 256, group, zeros, 1>::stage_bytes;
    using Ring = decode::Ring<Narrow::rows, 0, 256, group, zeros, fitting < 24 ? fitting : 24>;
    static_assert(Ring::stages >= Narrow::sets, "each pair of warps has a stage");
    static_assert(Narrow::sums_bytes <= Ring::scales_at, "partial sums reuse the stages");

    static constexpr int statistics_at = (Ring::bytes + copy_alignment - 1) / copy_alignment * copy_alignment;
    static constexpr int rows_at = statistics_at + 2 * statistics_bytes;
};

// Sums over the lanes that hold a row, the same bits in each: of several rows, which hide the latency of each other.
template <int count>
__device__ __forceinline__ void add_up_rows(float2 (&values)[count], int segments_shift) {
#pragma unroll
    for (int distance = 1; distance < warp_size; distance *= 2) {
        if (distance < quad << segments_shift) {
#pragma unroll
            for (float2 &value : values) {
                value.x += __shfl_xor_sync(0xffffffffu, value.x, distance);
                value.y += __shfl_xor_sync(0xffffffffu, value.y, distance);
            }
        }
    }
}

// What four lanes find of a part that is `there`: each adds up what two warps have left.
template <int warps>
__device__ __forceinline__ float2 sum_of_warps(const float2 (&of_part)[8], bool there, int lane) {
    const int first = lane % quad * 2;
    float4 found = make_float4(0.f, 0.f, 0.f, 0.f);
    if (there && first < warps) {
        found = *reinterpret_cast<const float4 *>(&of_part[first]);
    }
    return make_float2(found.x + found.z, found.y + found.w);
}

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

// From global to shared memory, without a register.
__device__ __forceinline__ void copy_vector(std::uint32_t to, const __half *from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

// For those that this thread has asked for.
__device__ __forceinline__ void wait_for_copied_vectors() { asm volatile("cp.async.wait_all;" ::: "memory"); }

__device__ __forceinline__ float2 floats_of(std::uint32_t pair) {
    return __half22float2(reinterpret_cast<const __half2 &>(pair));
}

// A word of a vector, by a number that is known when the loop around it is unrolled.
__device__ __forceinline__ std::uint32_t &word_of(uint4 &vector, int i) {
    return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Keeps what is computed of a value from being computed ahead, where it would take registers.
__device__ __forceinline__ int opaque(int value) {
    asm volatile("" : "+r"(value));
    return value;
}

// A normalised value is (x - shift) * factor + offset, before weight and bias.
struct Scaling {
    float shift;
    float factor;
    float offset;
};

// Normalises the rows into shared memory, where they lie as narrow_multiply() reads them: in tiles of 64 columns by the
// tokens of a box, in lines of 128 bytes, whose 16-byte chunks are swizzled by the line's number in its stage.
template <typename Shape>
struct Normalizer {
    static constexpr int row_sets = Shape::row_sets;
    static constexpr int vectors = Shape::vectors;
    static constexpr int consumers = Shape::warps * warp_size;
    static constexpr int weights_ahead = 2; // vectors of weight and bias that are asked for along with the rows
    using Statistics = float2[row_sets][parts_of_a_set][8];

    const Norm &norm;
    Statistics &sums;
    Statistics &deviations;
    unsigned char *rows;
    int m;
    int padded_vectors; // of a row, up to the end of the last stage
    int lane;
    int warp;

    int part = lane / quad;
    int row_in_set = part >> norm.segments_shift;
    int set_rows = parts_of_a_set >> norm.segments_shift;
    int row_vectors = norm.hidden / vector_halves;
    int segment = part & ((1 << norm.segments_shift) - 1);
    // The vectors of this lane.
    int first_vector = ((warp << norm.segments_shift) + segment) * quad + lane % quad;
    int step = (Shape::warps << norm.segments_shift) * quad;

    __device__ __forceinline__ int vector_of(int v) const { return first_vector + v * step; }

    // The weight's and the bias's vector: zeros for columns of the padding, which makes those zeros, too.
    __device__ __forceinline__ void load_weights(uint4 (&found)[2], int v) const {
        constexpr std::uint32_t ones = 0x3C003C00u;
        const int vector = opaque(vector_of(v));
        const bool inside = vector < row_vectors;
        found[0] = load_vector(
            norm.weight + vector * vector_halves, inside && norm.weight != nullptr, inside ? ones : 0);
        found[1] = load_vector(norm.bias + vector * vector_halves, inside && norm.bias != nullptr, 0);
    }

    // Where a vector of a row lies in shared memory.
    __device__ __forceinline__ uint4 *place(int row, int vector) const {
        const unsigned int tile = static_cast<unsigned int>(vector) / 8; // of 64 columns
        const unsigned int chunk = static_cast<unsigned int>(vector) % 8;
        const unsigned int box = narrow_box_tokens(Shape::tokens, m);
        const unsigned int line_of_stage = tile % 4 * box + row;
        return reinterpret_cast<uint4 *>(rows + (tile * box + row) * 128 + (chunk ^ (line_of_stage % 8)) * 16);
    }

    // All rows, in as few passes as registers allow.  `wait` returns when they may be read.
    template <typename Wait>
    __device__ __forceinline__ void run(Wait wait) {
        const __half *from = norm.x + row_in_set * norm.x_stride + first_vector * vector_halves;
        asm volatile("" : "+l"(from)); // everything that can be is computed before the wait
        wait();
        uint4 held[row_sets][vectors];
        uint4 weights[vectors][2];
        load(held, weights, from);
        const int pass_rows = row_sets * set_rows;
#pragma unroll 1
        for (int first = pass_rows; first < m; first += pass_rows) {
            from += pass_rows * norm.x_stride;
            fetch(first, from);
        }
        int first = 0;
#pragma unroll 1
        while (true) {
            add_up(held, first);
            sync_threads(1, consumers);
            Scaling scaling[row_sets];
            if (find_scaling(scaling, held, first)) {
                store<true>(held, weights, scaling, first);
            } else {
                store<false>(held, weights, scaling, first);
            }
            first += pass_rows;
            if (first >= m) {
                break;
            }
            load_fetched(held, weights, first);
            sync_threads(1, consumers); // statistics have been read
        }
    }

    // The rows of the first pass, by way of registers alone.
    __device__ __forceinline__ void load(
        uint4 (&held)[row_sets][vectors], uint4 (&weights)[vectors][2], const __half *from) const {
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            const bool there = q * set_rows + row_in_set < m;
#pragma unroll
            for (int v = 0; v < vectors; ++v) {
                held[q][v] = load_vector(from + v * step * vector_halves, there && vector_of(v) < row_vectors, 0);
            }
            from += set_rows * norm.x_stride;
        }
        load_first_weights(weights);
    }

    // Those of later passes wait in shared memory, where they will lie when they are normalised.  Each thread reads and
    // writes what it has fetched itself.
    __device__ __forceinline__ void fetch(int first, const __half *from) const {
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            const int row = first + q * set_rows + row_in_set;
#pragma unroll
            for (int v = 0; v < vectors; ++v) {
                if (row < m && vector_of(v) < row_vectors) {
                    copy_vector(shared_address(place(row, vector_of(v))), from + v * step * vector_halves);
                }
            }
            from += set_rows * norm.x_stride;
        }
    }

    __device__ __forceinline__ void load_fetched(
        uint4 (&held)[row_sets][vectors], uint4 (&weights)[vectors][2], int first) const {
        load_first_weights(weights);
        wait_for_copied_vectors();
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            const int row = first + q * set_rows + row_in_set;
#pragma unroll
            for (int v = 0; v < vectors; ++v) {
                held[q][v] = make_uint4(0, 0, 0, 0);
                if (row < m && vector_of(v) < row_vectors) {
                    held[q][v] = *place(row, vector_of(v));
                }
            }
        }
    }

    __device__ __forceinline__ void load_first_weights(uint4 (&weights)[vectors][2]) const {
#pragma unroll
        for (int v = 0; v < weights_ahead; ++v) {
            load_weights(weights[v], v);
        }
    }

    // Whether a set, or a vector of each lane, is there at all: the same answer in all lanes.
    __device__ __forceinline__ bool has_set(int q, int first) const { return first + q * set_rows < m; }
    __device__ __forceinline__ bool has_vector(int v) const { return v * step < row_vectors; }

    __device__ __forceinline__ void add_up(const uint4 (&held)[row_sets][vectors], int first) {
        constexpr std::uint32_t ones = 0x3C003C00u;
        const bool diagonal = lane % quad == part / 2;
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            if (has_set(q, first)) {
                float sum[4] = {};
                float upper[4] = {};
                float lower[4] = {};
#pragma unroll
                for (int v = 0; v < vectors; ++v) {
                    if (has_vector(v)) {
                        const uint4 &x = held[q][v];
                        mma_16x8x16(sum, x.x, x.y, x.z, x.w, ones, ones, sum);
                        mma_16x8x8(upper, x.x, x.y, x.x, upper);
                        mma_16x8x8(lower, x.x, x.y, x.y, lower);
                        mma_16x8x8(upper, x.z, x.w, x.z, upper);
                        mma_16x8x8(lower, x.z, x.w, x.w, lower);
                    }
                }
                const float square = part % 2 == 0 ? upper[0] + lower[2] : upper[1] + lower[3];
                if (diagonal) {
                    sums[q][part][warp] = make_float2(sum[0] + sum[2], square);
                }
            }
        }
    }

    // Returns whether any row has a shift; the same answer in all threads.
    __device__ __forceinline__ bool find_scaling(
        Scaling (&scaling)[row_sets], const uint4 (&held)[row_sets][vectors], int first) {
        float2 found[row_sets];
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            found[q] = sum_of_warps<Shape::warps>(sums[q][part], has_set(q, first), lane);
        }
        add_up_rows(found, norm.segments_shift);
        bool careful[row_sets];
        bool any = false;
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            const float mean = norm.rms ? 0.f : found[q].x * norm.inverse;
            const float power = found[q].y * norm.inverse;
            const float variance = fmaf(-mean, mean, power);
            // A mean of four deviations costs a few bits, which is what the sums can spare.  NaNs count as well.
            careful[q] = !norm.rms && !(variance * 16.f >= power);
            any = any || careful[q];
            const float factor = rsqrtf(variance + norm.eps);
            scaling[q] = {careful[q] ? mean : 0.f, factor, -mean * factor};
        }
        any = __any_sync(0xffffffffu, any); // every warp has all parts, so all warps find the same
        if (any) {
            sum_deviations(scaling, careful, held, first);
        }
        return any;
    }

    // The second pass: deviations from the mean.  What rounding left of the mean is their own mean, far below them.
    __device__ __forceinline__ void sum_deviations(Scaling (&scaling)[row_sets], const bool (&careful)[row_sets],
        const uint4 (&held)[row_sets][vectors], int first) {
        const int segments = 1 << norm.segments_shift;
        float2 found[row_sets];
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            found[q] = make_float2(0.f, 0.f);
            if (!has_set(q, first)) {
                continue;
            }
#pragma unroll
            for (int v = 0; v < vectors; ++v) {
                if (vector_of(v) < row_vectors) {
                    uint4 x = held[q][v];
#pragma unroll
                    for (int i = 0; i < quad; ++i) {
                        const float2 pair = floats_of(word_of(x, i));
                        const float low = pair.x - scaling[q].shift;
                        const float high = pair.y - scaling[q].shift;
                        found[q].x += low + high;
                        found[q].y = fmaf(low, low, fmaf(high, high, found[q].y));
                    }
                }
            }
        }
        add_up_rows(found, norm.segments_shift);
        if ((lane & (quad * segments - 1)) == 0) {
#pragma unroll
            for (int q = 0; q < row_sets; ++q) {
                deviations[q][part][warp] = found[q];
            }
        }
        sync_threads(1, consumers);
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            found[q] = sum_of_warps<Shape::warps>(deviations[q][part & -segments], true, lane);
        }
        add_up_rows(found, 0);
#pragma unroll
        for (int q = 0; q < row_sets; ++q) {
            const float correction = found[q].x * norm.inverse;
            const float power = found[q].y * norm.inverse;
            // fmaxf would make 0 of a NaN.
            const float variance = isnan(power) ? power : fmaxf(fmaf(-correction, correction, power), 0.f);
            if (careful[q]) {
                scaling[q].factor = rsqrtf(variance + norm.eps);
                scaling[q].offset = -correction * scaling[q].factor;
            }
        }
    }

    template <bool shifted>
    __device__ __forceinline__ void store(const uint4 (&held)[row_sets][vectors], uint4 (&weights)[vectors][2],
        const Scaling (&scaling)[row_sets], int first) const {
#pragma unroll
        for (int v = 0; v < vectors; ++v) {
            if (v * step >= padded_vectors) { // the same in all lanes
                break;
            }
            if (v + weights_ahead < vectors) {
                load_weights(weights[v + weights_ahead], v + weights_ahead);
            }
            float2 weight[quad];
            float2 bias[quad];
#pragma unroll
            for (int i = 0; i < quad; ++i) {
                weight[i] = floats_of(word_of(weights[v][0], i));
                bias[i] = floats_of(word_of(weights[v][1], i));
            }
            const int vector = opaque(vector_of(v));
#pragma unroll
            for (int q = 0; q < row_sets; ++q) {
                if (!has_set(q, first)) {
                    break;
                }
                uint4 result = held[q][v];
#pragma unroll
                for (int i = 0; i < quad; ++i) {
                    std::uint32_t &word = word_of(result, i);
                    float2 x = floats_of(word);
                    if (shifted) {
                        x.x -= scaling[q].shift;
                        x.y -= scaling[q].shift;
                    }
                    x.x = fmaf(fmaf(x.x, scaling[q].factor, scaling[q].offset), weight[i].x, bias[i].x);
                    x.y = fmaf(fmaf(x.y, scaling[q].factor, scaling[q].offset), weight[i].y, bias[i].y);
                    const __half2 halves = __floats2half2_rn(x.x, x.y);
                    word = reinterpret_cast<const std::uint32_t &>(halves);
                }
                const int row = first + q * set_rows + row_in_set;
                if (row < m && vector < padded_vectors) {
                    *place(row, vector) = result;
                }
            }
        }
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
        ring, {&weights, nullptr, &scales, &zeros}, problem, Work{first_row, 0, 0, blocks}, 0};
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

    using Statistics = typename Normalizer<Shape>::Statistics;
    unsigned char *const statistics = shared + Shape::statistics_at;
    Normalizer<Shape> normalizer{norm, *reinterpret_cast<Statistics *>(statistics),
        *reinterpret_cast<Statistics *>(statistics + Shape::statistics_bytes), shared + Shape::rows_at, problem.m,
        blocks * vectors_of_a_stage, lane, warp};
    normalizer.run([&] {
        if (problem.dependence != independent) {
            wait_for_dependencies();
        }
    });
    sync_threads(1, Shape::warps * warp_size);

    const std::uint32_t rows = shared_address(shared + Shape::rows_at);
    const int stage_bytes = Ring::stage_k * 2 * narrow_box_tokens(Shape::tokens, problem.m); // of rows
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
