// More tokens (16 to 256 a CTA): wgmma with the weights as the first operand, converted to half in registers.
//
// A CTA owns 64 * row_groups columns of W ("rows", they are the rows of the product) and a share of K; the CTAs of a
// cluster share K among them and add up through each other's shared memory in a fixed order.  Each consumer warpgroup
// has 64 rows; with `sets` > 1, as many warpgroups have the same rows and take stages in turn.
//
// Weights become operands 32 of K at a time, in one of `buffers` sets of registers, while the tensor cores work on the
// ones before.  Scales are applied in one of two ways:
//   folded   to the FP32 sum over each group; the operand is q - 8.  A sixth fewer instructions up to M = 32, and
//            instructions are what bounds these kernels.  Groups of 128 and larger, no zeros.
//   scaled   to the operand, w = (q - 8) * s + z rounded to half, as the GEMM kernels do.  Everything else.

#pragma once

#include "ring.h"
#include "wgmma.h"

namespace w4a16::decode {

template <int row_groups_, int sets_, int tokens_, int stage_k_, int stages_, bool zeros_, bool folded_,
    int buffers_, int ctas_per_sm_, bool streams_> // 0 stages: as many as fit
struct WideShape {
    static constexpr int row_groups = row_groups_;
    static constexpr int sets = sets_;
    static constexpr int tokens = tokens_;
    static constexpr bool zeros = zeros_;
    static constexpr bool folded = folded_;
    static constexpr int buffers = buffers_;
    static constexpr int ctas_per_sm = ctas_per_sm_;
    static constexpr int rows = 64 * row_groups;
    static constexpr int warpgroups = row_groups * sets;
    static constexpr int consumers = warpgroups * 128;
    // Registers come to four warps at a time, so a fifth of a kind costs as many as four more.  Where sums need what is
    // left, the warp that copies has three idle ones beside it, and these four hand theirs to the consumers.
    static constexpr bool moves_registers = streams_ || tokens * warpgroups >= 512;
    static constexpr int producer_registers = streams_ ? 32 : 24;
    static constexpr int threads = consumers + (moves_registers ? 4 : producer_warps) * warp_size;
    // What a CTA starts with is all that its warps can hand to one another: with more, they would wait for ever.
    static constexpr int launch_registers = 65536 / (threads * ctas_per_sm) / 8 * 8;
    static constexpr int consumer_registers = (launch_registers * threads - 128 * producer_registers) / consumers / 8 * 8;
    static_assert(!moves_registers || consumer_registers <= 256, "the most that setmaxnreg takes");
    using Ring = FittingRing<rows, tokens, stage_k_, 64, zeros, stages_, ctas_per_sm>;
    static_assert(Ring::bytes <= shared_bytes_of_a_cta(ctas_per_sm), "the stages fit into shared memory");
    static_assert(!(zeros && folded), "a zero is added to each weight");
    static_assert(buffers == 2 || buffers == 4, "a stage of 4 spans starts with the first buffer");
    static_assert(Ring::stages > 2 * sets - 1, "a consumer holds on to the stage before the one that it is on");

    static constexpr int sums_pitch = rows + 4; // keeps the four lanes of a row pair in different banks
    static constexpr int sums_bytes = sets * tokens * sums_pitch * 4;
    static_assert(sums_bytes <= Ring::scales_at, "partial sums reuse the stages");

    // CTAs that can share K: what they send to one of them comes after its partial sums.
    static constexpr bool shared_by(int shares) {
        return tokens % shares == 0 && sums_bytes + (shares - 1) * (tokens / shares) * rows * 4 <= Ring::scales_at;
    }
    // From the middle of a stage on, what the next one needs may take the place of what was used up; else every stage begins
    // with the latencies of a barrier and of shared memory.  With few tokens and several sets other warps hide those,
    // and a stage that is further ahead is awaited in vain (measured: 5 to 9 % slower; 5 to 15 % faster here).
    static constexpr bool reads_ahead = sets == 1 || tokens >= 128;
    static constexpr int streams = streams_ ? ctas_per_sm : 0; // see streaming.h
    static constexpr int most_shares = streams_ ? 1 : shared_by(8) ? 8 : shared_by(4) ? 4 : shared_by(2) ? 2 : 1;
    static constexpr int shared_bytes = Ring::bytes;
    static constexpr bool small_boxes = false;
};

__device__ __forceinline__ std::uint32_t bits_of(__half2 value) { return *reinterpret_cast<std::uint32_t *>(&value); }

// Nibbles 0 and 4 of a word, less 8.
__device__ __forceinline__ __half2 convert_low(std::uint32_t word) {
    std::uint32_t bits; // 1024 + q
    asm("lop3.b32 %0, %1, 0x000F000F, 0x64006400, 0xEA;" : "=r"(bits) : "r"(word));
    return __hsub2(*reinterpret_cast<__half2 *>(&bits), __half2half2(__ushort_as_half(0x6408)));
}

// Nibbles 1 and 5, less 8.
__device__ __forceinline__ __half2 convert_high(std::uint32_t word) {
    std::uint32_t bits; // 1024 + 16 q
    asm("lop3.b32 %0, %1, 0x00F000F0, 0x64006400, 0xEA;" : "=r"(bits) : "r"(word));
    return __hfma2(*reinterpret_cast<__half2 *>(&bits), __half2half2(__ushort_as_half(0x2C00)),
        __half2half2(__ushort_as_half(0xD480))); // / 16 - 72
}

__device__ __forceinline__ float4 sum_of(float4 a, float4 b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// The sums of one warpgroup's lane: `part` over the group at hand, where scales are folded, and `total`.
template <typename Shape>
struct WideSums {
    float total[Shape::tokens / 2] = {};
    [[maybe_unused]] float part[Shape::tokens / 2] = {};
    [[maybe_unused]] float scale[2] = {0.f, 0.f}; // of the group that `part` is over

    __device__ __forceinline__ void fold() {
#pragma unroll
        for (int i = 0; i < Shape::tokens / 2; ++i) {
            asm volatile("" : "+f"(part[i])::"memory"); // wgmma wrote it since the compiler saw it last
            total[i] = fmaf(part[i], scale[i / 2 % 2], total[i]);
        }
    }
};

// A consumer warp: where it reads in a stage, what it has read, and its sums.
template <typename Shape>
struct WideWarp {
    using Ring = typename Shape::Ring;
    static constexpr int tokens = Shape::tokens;
    static constexpr int buffers = Shape::buffers;
    static constexpr int row_bytes = Ring::stage_k / 2;
    static constexpr int spans = Ring::stage_k / 32;

    const Ring &ring;
    const int group_shift;
    const int set;
    const int row; // of the tile; the lane has that and the one 8 below
    const std::uint64_t first_tile;
    std::uint32_t word_offset[spans]; // of 32 of K each; a line of 128 bytes has its chunks swizzled by its number

    WideSums<Shape> sums;
    std::uint32_t operand[buffers][8] = {};
    std::uint32_t word[spans][2];
    [[maybe_unused]] __half2 scale[2];
    [[maybe_unused]] __half2 zero[2];
    Cursor<Ring> cursor;
    int last_stage = -1; // where products may be in flight

    __device__ __forceinline__ WideWarp(const Ring &ring, const Problem &problem, int warp, int lane)
        : ring(ring), group_shift(problem.group_shift), set(warp / 4 / Shape::row_groups),
          row(warp / 4 % Shape::row_groups * 64 + warp % 4 * 16 + lane / 4),
          first_tile(tile_descriptor(ring.activations(0))), cursor(set) {
#pragma unroll
        for (int i = 0; i < spans; ++i) {
            word_offset[i] = row * row_bytes + lane % 4 * 4 + ((i ^ (spans == 8 ? lane / 4 : lane / 8)) << 4);
            asm volatile("" : "+r"(word_offset[i])); // else it is computed anew in every round
        }
    }

    __device__ __forceinline__ void load_words(int stage, int span) {
        const std::uint32_t from = ring.weights(stage) + word_offset[span];
        word[span][0] = load_word(from);
        word[span][1] = load_word(from + 8 * row_bytes);
    }

    __device__ __forceinline__ void load_scales(int stage, int span) { // of 64 of K, the smallest group
        const std::uint32_t from = ring.scales(stage) + row * 2 + (span / 2 * 64 >> group_shift) * Ring::scale_row_bytes;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            scale[side] = __half2half2(load_half(from + side * 16));
            if (Shape::zeros) {
                zero[side] = __half2half2(load_half(from + side * 16 + Ring::zeros_after));
            }
        }
    }

    __device__ __forceinline__ void open_stage() {
        barrier_wait(ring.full(cursor.fill), cursor.parity);
#pragma unroll
        for (int span = 0; span < spans; ++span) {
            load_words(cursor.stage, span);
        }
        if (!Shape::folded) {
            load_scales(cursor.stage, 0);
        }
    }

    // Before the first product, where there is one.
    __device__ __forceinline__ void begin() {
        if (Shape::reads_ahead) {
            open_stage();
        }
    }

    // Adds up the products of every `sets`-th stage from `block` up to `end`, where more follow up to `last`.  Then none is in
    // flight, and all stages but the last one are given back.
    __device__ __forceinline__ void multiply(int block, int end, int last) {
        for (; block < end; block += Shape::sets) {
            if (!Shape::reads_ahead) {
                open_stage();
            }
            const std::uint64_t tile = first_tile + cursor.stage * (Ring::tile_bytes / 16);
            Cursor<Ring> next = cursor;
            next.advance(Shape::sets);
            // Words are read ahead in any case.  Where none follow, sums of others may be on their way to the next stage.
            const bool follows = block + Shape::sets < last;
            const int ahead = Shape::streams > 0 && !follows ? cursor.stage : next.stage;
            // No branch in here but the wait: ptxas serialises every wgmma (C7513) where one leads past a group in flight.
#pragma unroll
            for (int span = 0; span < spans; ++span) {
                std::uint32_t(&a)[8] = operand[span % buffers];
                wgmma_wait<buffers - 1>();
                hold(a);
                if (span == buffers - 1) { // all products of the stage before are done
                    __syncwarp();
                    barrier_arrive_by_warp(ring.empty(last_stage), last_stage >= 0);
                }
#pragma unroll
                for (int side = 0; side < 2; ++side) {
                    const std::uint32_t early = word[span][side];
                    const std::uint32_t late = early >> 8;
                    const __half2 q[4] = {convert_low(early), convert_high(early), convert_low(late), convert_high(late)};
#pragma unroll
                    for (int i = 0; i < 4; ++i) {
                        a[2 * i + side] = bits_of(Shape::folded ? q[i]
                                : Shape::zeros                  ? __hfma2(q[i], scale[side], zero[side])
                                                                : __hmul2(q[i], scale[side]));
                    }
                }
                if (Shape::reads_ahead && span == spans / 2) {
                    barrier_wait(ring.full(next.fill), next.parity, follows);
                }
                if (Shape::reads_ahead && span >= spans / 2) {
                    load_words(ahead, (span - spans / 2) * 2);
                    load_words(ahead, (span - spans / 2) * 2 + 1);
                }
                if (!Shape::folded && span % 2 == 1 && (span + 1 < spans || Shape::reads_ahead)) {
                    load_scales(span + 1 < spans ? cursor.stage : ahead, (span + 1) % spans);
                }
                if (Shape::folded && span % 4 == 0) {
                    wgmma_wait<0>();
#pragma unroll
                    for (int i = 0; i < buffers; ++i) {
                        hold(operand[i]);
                    }
                    sums.fold();
                    const std::uint32_t scales_here = ring.scales(cursor.stage) + row * 2
                        + (span / 4 * 128 >> group_shift) * Ring::scale_row_bytes;
                    sums.scale[0] = __half2float(load_half(scales_here));
                    sums.scale[1] = __half2float(load_half(scales_here + 16));
                }
                float(&sum)[tokens / 2] = Shape::folded ? sums.part : sums.total;
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const std::uint64_t at_k = tile + (span / 2 * tokens * 128 + (span % 2 * 2 + i) * 32) / 16;
                    if (Shape::folded && span % 4 == 0 && i == 0) {
                        Wgmma<tokens>::template multiply<false>(
                            sum, a[i * 4], a[i * 4 + 1], a[i * 4 + 2], a[i * 4 + 3], at_k);
                    } else {
                        Wgmma<tokens>::multiply(sum, a[i * 4], a[i * 4 + 1], a[i * 4 + 2], a[i * 4 + 3], at_k);
                    }
                }
                wgmma_commit();
            }
            last_stage = cursor.stage;
            cursor = next;
        }
        wgmma_wait<0>();
#pragma unroll
        for (int i = 0; i < buffers; ++i) {
            hold(operand[i]);
        }
        if (Shape::folded) {
            sums.fold();
        }
    }
};

// Sets up the ring and fills it for the first time; the warps that are not consumers go on to do what `beside` says.
// Returns whether this warp is a consumer.
template <typename Shape, typename Source, typename Beside>
__device__ __forceinline__ bool wide_begin(const Source &source, int warp, const Beside &beside) {
    constexpr int warps = Shape::warpgroups * 4;
    if (elect_lane()) {
        source.ring.init(Shape::row_groups * 4, warp, Shape::threads / warp_size);
        if (warp == warps) {
            source.prefetch_maps();
        }
    }
    __syncwarp();
    __syncthreads();
    if (warp >= warps) {
        if constexpr (Shape::moves_registers) {
            give_registers<Shape::producer_registers>();
        }
        beside(warp - warps);
        return false;
    }
    if constexpr (Shape::moves_registers) {
        take_registers<Shape::consumer_registers>();
    }
    source.begin(warp, warps);
    return true;
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::ctas_per_sm)
    wide_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
        const __grid_constant__ CUtensorMap scales, const __grid_constant__ CUtensorMap zeros, const Problem problem) {
    using Ring = typename Shape::Ring;
    constexpr int tokens = Shape::tokens;
    constexpr int warps = Shape::warpgroups * 4;
    extern __shared__ __align__(1024) unsigned char shared[];
    const Ring ring{shared_address(shared)};
    const int lane = threadIdx.x % warp_size;
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / warp_size), 0); // makes it uniform
    const int shares = cluster_size();
    const int share = cluster_rank();
    const int first_row = blockIdx.x / shares * Shape::rows;
    const int first_token = blockIdx.y * tokens;
    const int all_blocks = (problem.k + Ring::stage_k - 1) / Ring::stage_k;
    const int first_block = all_blocks * share / shares;
    const int blocks = all_blocks * (share + 1) / shares - first_block;

    if (problem.dependence == release_early) {
        release_dependents();
    }
    const Source<Ring, Shape::zeros> source{ring, {&weights, &activations, &scales, &zeros}, problem,
        Work{{first_row, first_token, first_block}, blocks}, Ring::activation_bytes};
    const auto copy = [&](int other) {
        if (other == 0) {
            source.feed();
        }
    };
    if (!wide_begin<Shape>(source, warp, copy)) {
        return;
    }
    WideWarp<Shape> own(ring, problem, warp, lane);
    const int set = own.set;
    const int row = own.row;
    if (set < blocks) {
        own.begin();
    }
    own.multiply(set, blocks, blocks);

    // Every fill has been waited for by some warp, so when all of them are here the stages are free.
    const bool alone = shares == 1;
    if (!alone) {
        arrive_at_cluster(); // the others may send their sums
    }
    constexpr int pitch = Shape::sums_pitch;
    float *const partial = reinterpret_cast<float *>(shared);
    float4 *const received = reinterpret_cast<float4 *>(shared + Shape::sums_bytes);
    sync_threads(1, Shape::consumers);
#pragma unroll
    for (int i = 0; i < tokens / 2; ++i) {
        const int token = i / 4 * 8 + lane % 4 * 2 + i % 2;
        partial[(set * tokens + token) * pitch + row + i / 2 % 2 * 8] = own.sums.total[i];
    }
    sync_threads(1, Shape::consumers);

    // Each CTA of the cluster finishes its share of the tokens, four rows at a time.  The others add up theirs over the
    // sets and send them: a store waits for nothing, a load from another SM would take a microsecond.
    constexpr int quads = Shape::rows / 4;
    const int own_tokens = tokens / shares;
    const auto sum_of_sets = [&](int token, int quad) {
        float4 total = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
        for (int s = 0; s < Shape::sets; ++s) {
            total = sum_of(total, *reinterpret_cast<const float4 *>(partial + (s * tokens + token) * pitch + quad * 4));
        }
        return total;
    };
    const int present = min(problem.m - first_token, tokens);
    if (!alone) {
        wait_for_cluster();
        for (int other = 1; other < shares; ++other) {
            const int to = share + other < shares ? share + other : share + other - shares;
            const int slot = share < to ? share : share - 1;
            const std::uint32_t place = remote_address(shared_address(received + slot * own_tokens * quads), to);
#pragma unroll 2
            for (int i = threadIdx.x; i < own_tokens * quads; i += Shape::consumers) {
                const int token = to * own_tokens + i / quads;
                if (token < present) {
                    store_remote(place + i * 16, sum_of_sets(token, i % quads));
                }
            }
        }
        arrive_at_cluster();
        wait_for_cluster();
    }
#pragma unroll 2
    for (int i = threadIdx.x; i < own_tokens * quads; i += Shape::consumers) {
        const int token = share * own_tokens + i / quads;
        const int n = first_row + i % quads * 4;
        if (token >= present || n >= problem.n) {
            continue;
        }
        float4 total = sum_of_sets(token, i % quads);
        if (!alone) { // in the order of their parts of K, whoever adds them up
            const float4 own = total;
            total = {0.f, 0.f, 0.f, 0.f};
            for (int from = 0; from < shares; ++from) {
                const int slot = from < share ? from : from - 1;
                total = sum_of(total, from == share ? own : received[slot * own_tokens * quads + i]);
            }
        }
        if (problem.bias != nullptr) {
            total.x += __half2float(problem.bias[n]);
            total.y += __half2float(problem.bias[n + 1]);
            total.z += __half2float(problem.bias[n + 2]);
            total.w += __half2float(problem.bias[n + 3]);
        }
        const __half2 out[2] = {__floats2half2_rn(total.x, total.y), __floats2half2_rn(total.z, total.w)};
        *reinterpret_cast<uint2 *>(problem.place(first_token + token, n)) = *reinterpret_cast<const uint2 *>(out);
    }
}

} // namespace w4a16::decode
