// Few tokens (8 or 16 a CTA): mma.sync with the weights as the first operand, never converted to half.
//
// A CTA owns 16 * row_tiles columns of W ("rows", they are the rows of the product) and all of K.  One warp drives the
// copy engine; the others split K: a stage is 256 of K, each half of it is one warp's, and the pairs of warps take
// stages in turn.  They add up through shared memory in a fixed order.
//
// A packed word holds, for one row, K = 2t + 8j and the one after it in nibbles j and j + 4.  Masked with 0x000F000F,
// resp. 0x00F000F0, a word is two FP16 denormals q * 2^-24, resp. q * 2^-20, which the tensor core multiplies exactly:
// j = 0 and 2 (after a shift by 8) make one operand, j = 1 and 3 another, summed apart ("low", "high").  What the 8 in
// q - 8 takes away does not depend on the row, so it is summed once for all row tiles.

#pragma once

#include "ring.h"

namespace w4a16::decode {

template <int row_groups_, int row_tiles_, int token_tiles_, int warps_, int stages_, int group_, bool zeros_,
    int ctas_per_sm_> // 0 stages: as many as fit
struct NarrowShape {
    static constexpr int row_groups = row_groups_;   // warps side by side, on the same part of K
    static constexpr int row_tiles = row_tiles_;     // of 16, of one warp
    static constexpr int token_tiles = token_tiles_; // of 8
    static constexpr int warps = warps_;             // consumers
    static constexpr int group = group_;             // 32, 64, or 128 for every larger one
    static constexpr bool zeros = zeros_;
    static constexpr int ctas_per_sm = ctas_per_sm_;
    static constexpr int rows = 16 * row_tiles * row_groups;
    static constexpr int tokens = 8 * token_tiles;
    static constexpr int shares = warps / row_groups; // of K
    static constexpr int sets = shares / 2;
    // As in WideShape: sums of many rows need registers that three idle warps beside the one that copies bring along.
    static constexpr bool moves_registers = token_tiles == 2 && row_tiles > 5;
    static constexpr int consumer_registers = 232;
    static constexpr int producer_registers = 24;
    static_assert(!moves_registers || warps == 8, "two warpgroups multiply");
    static constexpr int threads = (warps + (moves_registers ? 4 : producer_warps)) * warp_size;
    static_assert(sets > 0 && warps == sets * 2 * row_groups, "every row group has as many pairs of warps");
    using Ring = FittingRing<rows, tokens, 256, group, zeros, stages_, ctas_per_sm>;
    static_assert(Ring::bytes <= shared_bytes_of_a_cta(ctas_per_sm), "the stages fit into shared memory");
    static_assert(Ring::stages >= sets, "each pair of warps has a stage to begin with");

    static constexpr int sums_pitch = rows + 4; // keeps the four lanes of a row pair in different banks
    static constexpr int sums_bytes = shares * tokens * sums_pitch * 4;
    static_assert(sums_bytes <= Ring::scales_at, "partial sums reuse the stages");
    static constexpr int shared_bytes = Ring::bytes;
    static constexpr int most_shares = 1;
    static constexpr int streams = 0;
    static constexpr bool small_boxes = tokens == 8; // of activations, see narrow_box_tokens
};

// Up to 8 tokens, only those that exist are copied; zeros beyond them would cost time, and nobody reads the results.
__device__ constexpr int narrow_box_tokens(int tokens, int m) { return tokens == 8 && m < 8 ? m : tokens; }

// What q - 8 takes away: the sum of a group of activations times `factor` (a pair of halves), where a product has the
// element of its token.  A fragment of activations has the same form as first and as second operand, so two of them
// are summed at once: of two tiles of tokens, or of two parts of K.
template <int spans, int token_tiles>
__device__ __forceinline__ void sum_activations(float (&sum)[token_tiles][4],
    const std::uint32_t (&token)[token_tiles][spans][4], std::uint32_t factor, int lane) {
    static_assert(token_tiles <= 2, "rows of the first operand");
    constexpr int chains = 2; // hide the latency of each other
    float part[chains][4] = {};
#pragma unroll
    for (int span = 0; span < spans; ++span) {
        const std::uint32_t(&first)[4] = token[0][span];
        if (token_tiles == 1) {
            mma_16x8x16(part[span % chains], first[0], first[2], first[1], first[3], factor, factor,
                part[span % chains]);
        } else {
            const std::uint32_t(&second)[4] = token[token_tiles - 1][span];
            mma_16x8x16(part[0], first[0], second[0], first[1], second[1], factor, factor, part[0]);
            mma_16x8x16(part[1], first[2], second[2], first[3], second[3], factor, factor, part[1]);
        }
    }
    const float upper = part[0][0] + part[1][0]; // of the token that is the row lane / 4
    const float lower = part[0][2] + part[1][2];
    const int of_even = lane % 4 * 8;
#pragma unroll
    for (int tile = 0; tile < token_tiles; ++tile) {
        const float mine = token_tiles == 1 ? upper + lower : tile == 0 ? upper : lower;
        const float even = __shfl_sync(0xffffffffu, mine, of_even);
        const float odd = __shfl_sync(0xffffffffu, mine, of_even + 4);
        sum[tile][0] = sum[tile][2] = even;
        sum[tile][1] = sum[tile][3] = odd;
    }
}

// Multiplies 128 of K.
template <typename Shape>
__device__ __forceinline__ void narrow_multiply(float (&sum)[Shape::row_tiles][Shape::token_tiles][4],
    std::uint32_t weights, std::uint32_t activations, std::uint32_t scales, int half, int first_scale_row,
    int first_row, int m, int lane) {
    constexpr int token_tiles = Shape::token_tiles;
    constexpr int spans = Shape::group / 32; // of 32 of K, the unit of the packing
    constexpr std::uint32_t low_mask = 0x000F000Fu;
    constexpr std::uint32_t high_mask = 0x00F000F0u;
    std::uint32_t minus_8; // -8 * 2^-20, twice; through asm, else the compiler makes it with an FADD
    asm("mov.b32 %0, 0x80808080;" : "=r"(minus_8));

    const int row = lane / 4;
    // Chunks of 8 halves in the order 0 2 1 3: the first two belong to the low operand.
    const int chunk = (lane / 16) + (lane / 8 % 2) * 2;
    const int token_row = min(lane % 8, m - 1); // any row will do beyond m, if it is one that was copied
    std::uint32_t token_line[2]; // of two tiles of 64 of K; a line's swizzle follows from its address
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int line = (half * 2 + i) * narrow_box_tokens(Shape::tokens, m)
            + (Shape::tokens == 8 ? token_row : lane % 8);
        token_line[i] = activations + line * 128 + ((chunk ^ (line % 8)) << 4);
    }
    const std::uint32_t word_line = weights + (first_row + row) * 128 + (((half * 4) ^ row) << 4) + lane % 4 * 4;
    const std::uint32_t scale_line = scales + (first_row + row) * 2;

#pragma unroll
    for (int group = 0; group < 4 / spans; ++group) {
        std::uint32_t token[token_tiles][spans][4];
#pragma unroll
        for (int tile = 0; tile < token_tiles; ++tile) {
#pragma unroll
            for (int span = 0; span < spans; ++span) {
                const int of_half = group * spans + span;
                load_matrices(token[tile][span],
                    (token_line[of_half / 2] + tile * 1024) ^ (of_half % 2 << 6));
            }
        }
        float eights[token_tiles][4];
        sum_activations<spans>(eights, token, minus_8, lane);
        // With few row tiles the latency of a chain of products counts, with many its number of instructions.
        constexpr bool apart = Shape::row_tiles <= 2;
#pragma unroll
        for (int tile = 0; tile < Shape::row_tiles; ++tile) {
            std::uint32_t word[2][spans];
#pragma unroll
            for (int span = 0; span < spans; ++span) {
                const std::uint32_t at = word_line ^ ((group * spans + span) << 4);
                word[0][span] = load_word(at + tile * 2048);
                word[1][span] = load_word(at + tile * 2048 + 1024);
            }
            float scale[2];
            [[maybe_unused]] float zero[2];
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const int of_stage = (first_scale_row + group) * Shape::rows + tile * 16 + side * 8;
                const std::uint32_t at = scale_line + of_stage * 2;
                scale[side] = __half2float(load_half(at));
                if (Shape::zeros) { // in the unit of `eights`, which is -8 times the sum of the activations
                    constexpr int to_zeros = Shape::Ring::zeros_after;
                    zero[side] = -0.125f * __half2float(load_half(at + to_zeros));
                }
            }
            float low[token_tiles][4] = {};
            float high[token_tiles][4] = {};
#pragma unroll
            for (int span = 0; span < spans; ++span) {
                const std::uint32_t upper = word[0][span];
                const std::uint32_t lower = word[1][span];
                const std::uint32_t upper_8 = upper >> 8;
                const std::uint32_t lower_8 = lower >> 8;
#pragma unroll
                for (int t = 0; t < token_tiles; ++t) {
                    mma_16x8x16(low[t], upper & low_mask, lower & low_mask, upper_8 & low_mask, lower_8 & low_mask,
                        token[t][span][0], token[t][span][1], low[t]);
                    mma_16x8x16(high[t], upper & high_mask, lower & high_mask, upper_8 & high_mask, lower_8 & high_mask,
                        token[t][span][2], token[t][span][3], span == 0 && !apart ? eights[t] : high[t]);
                }
            }
#pragma unroll
            for (int t = 0; t < token_tiles; ++t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float &total = sum[tile][t][i];
                    const float part = fmaf(low[t][i], 16.f, high[t][i]);
                    total = fmaf(apart ? part + eights[t][i] : part, scale[i / 2], total);
                    if (Shape::zeros) {
                        total = fmaf(eights[t][i], zero[i / 2], total);
                    }
                }
            }
        }
    }
}

// Adds up what the consumer warps have summed, by way of the stages, and writes the outputs.
template <typename Shape>
__device__ __forceinline__ void narrow_finish(const float (&sum)[Shape::row_tiles][Shape::token_tiles][4],
    unsigned char *shared, const Problem &problem, int first_row, int first_token, int share, int warp_row, int lane) {
    // Every fill has been waited for by some warp, so after this barrier the stages are free.
    constexpr int consumers = Shape::warps * warp_size;
    constexpr int pitch = Shape::sums_pitch;
    float *sums = reinterpret_cast<float *>(shared);
    sync_threads(1, consumers);
#pragma unroll
    for (int tile = 0; tile < Shape::row_tiles; ++tile) {
#pragma unroll
        for (int t = 0; t < Shape::token_tiles; ++t) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int token = t * 8 + lane % 4 * 2 + i % 2;
                const int row = warp_row + tile * 16 + lane / 4 + i / 2 * 8;
                sums[(share * Shape::tokens + token) * pitch + row] = sum[tile][t][i];
            }
        }
    }
    sync_threads(1, consumers);
    const int tokens = min(problem.m - first_token, Shape::tokens);
    for (int i = threadIdx.x; i < tokens * Shape::rows; i += consumers) {
        const int token = i / Shape::rows;
        const int row = i % Shape::rows;
        const int n = first_row + row;
        if (n < problem.n) {
            float total = 0.f;
#pragma unroll
            for (int from = 0; from < Shape::shares; ++from) {
                total += sums[(from * Shape::tokens + token) * pitch + row];
            }
            total *= 1048576.f; // 2^20, the unit of the high operand
            if (problem.bias != nullptr) {
                total += __half2float(problem.bias[n]);
            }
            *problem.place(first_token + token, n) = __float2half(total);
        }
    }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::ctas_per_sm)
    narrow_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
        const __grid_constant__ CUtensorMap scales, const __grid_constant__ CUtensorMap zeros, const Problem problem) {
    using Ring = typename Shape::Ring;
    constexpr int token_tiles = Shape::token_tiles;
    extern __shared__ __align__(1024) unsigned char shared[];
    const Ring ring{shared_address(shared)};
    const int lane = threadIdx.x % warp_size;
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / warp_size), 0); // makes it uniform
    const int first_row = blockIdx.x * Shape::rows;
    const int first_token = blockIdx.y * Shape::tokens;
    const int blocks = (problem.k + Ring::stage_k - 1) / Ring::stage_k;

    if (problem.dependence == release_early) {
        release_dependents();
    }
    const Source<Ring, Shape::zeros> source{ring, {&weights, &activations, &scales, &zeros}, problem,
        Work{{first_row, first_token, 0}, blocks}, Ring::stage_k * 2 * narrow_box_tokens(Shape::tokens, problem.m)};
    if (elect_lane()) {
        ring.init(2 * Shape::row_groups, warp, Shape::threads / warp_size);
        if (warp == Shape::warps) {
            source.prefetch_maps();
        }
    }
    __syncwarp();
    __syncthreads();
    if (warp >= Shape::warps) {
        if constexpr (Shape::moves_registers) {
            give_registers<Shape::producer_registers>();
        }
        if (warp == Shape::warps) {
            source.feed();
        }
        return;
    }
    if constexpr (Shape::moves_registers) {
        take_registers<Shape::consumer_registers>();
    }
    source.begin(warp, Shape::warps);

    const int share = warp / Shape::row_groups;
    const int warp_row = warp % Shape::row_groups * (Shape::row_tiles * 16);
    const int half = share % 2;
    const int first_scale_row = half * 128 >> problem.group_shift;
    const int set = share / 2;
    float sum[Shape::row_tiles][token_tiles][4] = {};
    Cursor<Ring> at(set);
#pragma unroll 1
    for (int block = set; block < blocks; block += Shape::sets) {
        barrier_wait(ring.full(at.fill), at.parity);
        narrow_multiply<Shape>(sum, ring.weights(at.stage), ring.activations(at.stage), ring.scales(at.stage), half,
            first_scale_row, warp_row, problem.m, lane);
        __syncwarp();
        barrier_arrive_by_warp(ring.empty(at.stage));
        at.advance(Shape::sets);
    }

    narrow_finish<Shape>(sum, shared, problem, first_row, first_token, share, warp_row, lane);
}

} // namespace w4a16::decode
