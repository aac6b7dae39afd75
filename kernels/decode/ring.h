// The ring of stages in shared memory between the copy engine and the warps that multiply, and what fills it.

#pragma once

#include "problem.h"
#include "ptx.h"

namespace w4a16::decode {

constexpr int warp_size = 32;

// The warp beside those that multiply refills stages.
constexpr int producer_warps = 1;

// Where the copy engine writes to.
constexpr int copy_alignment = 128;

// Shared memory of one CTA: a ring of stages that the copy engine fills and the consumer warps empty.  A stage is
// `rows` rows (columns of W) by `stage_k` of packed weights, `tokens` rows of activations (0: none pass through it) and
// the scales of each group.
template <int rows_, int tokens_, int stage_k_, int smallest_group, bool zeros, int stages_>
struct Ring {
    static constexpr int rows = rows_;
    static constexpr int tokens = tokens_;
    static constexpr int stage_k = stage_k_;
    static constexpr int stages = stages_;
    static constexpr int weight_bytes = rows * stage_k / 2;
    static constexpr int activation_bytes = tokens * stage_k * 2;
    static constexpr int tile_bytes = weight_bytes + activation_bytes;
    static constexpr int scale_rows = stage_k / smallest_group;
    static constexpr int scale_row_bytes = rows * 2;
    // The zeros follow the scales.
    static constexpr int zeros_after = (scale_rows * scale_row_bytes + copy_alignment - 1) / copy_alignment * copy_alignment;
    static constexpr int scale_bytes = zeros_after * (zeros ? 2 : 1);
    static constexpr int barriers_of_a_stage = 3;
    static constexpr int stage_bytes = tile_bytes + scale_bytes + 8 * barriers_of_a_stage;
    static_assert(
        weight_bytes % 1024 == 0 && activation_bytes % 1024 == 0, "swizzled tiles start at multiples of 1024");

    // Two full barriers a stage, used in turn: with consumers that visit only some fills of a stage, the parity of one
    // could not tell the fill that is awaited from the one two before.
    static constexpr int full_barriers = 2 * stages;
    static constexpr int scales_at = stages * tile_bytes;
    static constexpr int barriers_at = scales_at + stages * scale_bytes;
    static constexpr int bytes = barriers_at + 8 * (full_barriers + stages);
    static_assert(bytes == stages * stage_bytes, "a stage is all that a ring consists of");

    std::uint32_t base;

    __device__ std::uint32_t weights(int stage) const { return base + stage * tile_bytes; }
    __device__ std::uint32_t activations(int stage) const { return base + stage * tile_bytes + weight_bytes; }
    __device__ std::uint32_t scales(int stage) const { return base + scales_at + stage * scale_bytes; }
    // `fill` counts fills modulo full_barriers.
    __device__ std::uint32_t full(int fill) const { return base + barriers_at + 8 * fill; }
    __device__ std::uint32_t empty(int stage) const { return base + barriers_at + 8 * (full_barriers + stage); }

    // By one lane of each warp: a single one would take longer than the first copies.
    __device__ void init(int consumers_of_a_stage, int warp, int warps) const {
        constexpr int barriers = full_barriers + stages;
#pragma unroll 1
        for (int i = warp; i < barriers; i += warps) {
            barrier_init(base + barriers_at + 8 * i, i < full_barriers ? 1 : consumers_of_a_stage);
        }
        barrier_init_fence();
    }
};

constexpr int stages_that_fit(int stage_bytes, int ctas_per_sm) {
    constexpr int most = 24; // more than the latency of memory can use
    const int fit = shared_bytes_of_a_cta(ctas_per_sm) / stage_bytes;
    return fit < most ? fit : most;
}

// A ring of `stages`, or where that is 0 of as many as fit.
template <int rows, int tokens, int stage_k, int smallest_group, bool zeros, int stages, int ctas_per_sm>
using FittingRing = Ring<rows, tokens, stage_k, smallest_group, zeros,
    stages != 0 ? stages
                : stages_that_fit(Ring<rows, tokens, stage_k, smallest_group, zeros, 1>::stage_bytes, ctas_per_sm)>;

// Where a consumer that takes every `step`-th fill of a ring stands.
template <typename Ring>
struct Cursor {
    int stage;
    int fill;
    int parity = 0;

    __device__ explicit Cursor(int first) : stage(first), fill(first) {}

    __device__ void advance(int step) {
        stage += step;
        if (stage >= Ring::stages) {
            stage -= Ring::stages;
        }
        fill += step;
        if (fill >= Ring::full_barriers) {
            fill -= Ring::full_barriers;
            parity ^= 1;
        }
    }
};

// Where the one who fills a ring stands, after `filled` first fills that wait for nobody.
template <typename Ring>
struct Filler {
    int stage;
    int fill;
    int parity; // with which the stage is empty

    __device__ explicit Filler(int filled)
        : stage(filled % Ring::stages), fill(filled), parity(filled < Ring::stages ? 1 : 0) {}

    __device__ void advance() {
        if (++stage == Ring::stages) {
            stage = 0;
            parity ^= 1;
        }
        if (++fill == Ring::full_barriers) {
            fill = 0;
        }
    }
};

// Where a stage's rows and tokens begin, and which one it is of K.
struct Place {
    int row;
    int token;
    int block;
};

// What a CTA works on: all rows and tokens of one tile, and a part of K (in stages).
struct Work {
    Place first;
    int blocks;

    __device__ __forceinline__ Place at(int i) const { return {first.row, first.token, first.block + i}; }
};

// What the copy engine is told of a launch's operands.  Without zeros, or activations, that map is not used.
struct Maps {
    const CUtensorMap *weights;
    const CUtensorMap *activations;
    const CUtensorMap *scales;
    const CUtensorMap *zeros;
};

// Where a CTA's stages come from.
template <typename Ring_, bool with_zeros, typename Work_ = Work>
struct Source {
    using Ring = Ring_;

    const Ring &ring;
    Maps maps;
    const Problem &problem;
    Work_ work;
    int activation_bytes; // of a stage

    // These are called by one lane.

    // Weights with their scales: what lies beyond N or K becomes zeros.  A line of scales serves several CTAs.
    __device__ __forceinline__ void copy_weights(int stage, int fill, Place place) const {
        const std::uint32_t full = ring.full(fill);
        const int first_k = place.block * Ring::stage_k;
        const int group = first_k >> problem.group_shift;
        const int scale_bytes = max(1, Ring::stage_k >> problem.group_shift) * Ring::scale_row_bytes;
        barrier_arrive_expecting(
            full, Ring::weight_bytes + activation_bytes + scale_bytes * (with_zeros ? 2 : 1));
        copy_tile_2d(ring.weights(stage), maps.weights, first_k / 2, place.row, full, evict_first);
        copy_tile_2d(ring.scales(stage), maps.scales, place.row, group, full, evict_normal);
        if (with_zeros) {
            copy_tile_2d(ring.scales(stage) + Ring::zeros_after, maps.zeros, place.row, group, full, evict_normal);
        }
    }

    __device__ __forceinline__ void copy_activations(int stage, int fill, Place place) const {
        if (Ring::tokens == 0) {
            return;
        }
        copy_tile_3d(ring.activations(stage), maps.activations, 0, place.token, place.block * (Ring::stage_k / 64),
            ring.full(fill), evict_last);
    }

    __device__ __forceinline__ void prefetch_maps() const {
        prefetch_tensor_map(maps.weights);
        prefetch_tensor_map(maps.scales);
        if (Ring::tokens > 0) {
            prefetch_tensor_map(maps.activations);
        }
        if (with_zeros) {
            prefetch_tensor_map(maps.zeros);
        }
    }

    // These by all lanes of a warp.

    // The first round.  All consumer warps share it, because what one warp needs to issue it would take longer than the
    // memory does to answer.  Weights do not depend on earlier kernels, so they are asked for before waiting for those.
    __device__ __forceinline__ void begin(int warp, int warps) const {
        const int ahead = min(work.blocks, Ring::stages);
        if (elect_lane()) {
#pragma unroll 1
            for (int i = warp; i < ahead; i += warps) {
                const Place place = work.at(i);
                copy_weights(i, i, place);
                if (problem.dependence == independent) { // in the order of need, there is nothing to wait for
                    copy_activations(i, i, place);
                }
            }
            if (Ring::tokens > 0 && problem.dependence != independent) {
                wait_for_dependencies();
#pragma unroll 1
                for (int i = warp; i < ahead; i += warps) {
                    copy_activations(i, i, work.at(i));
                }
            }
        }
        __syncwarp();
    }

    // All later rounds, as stages become empty.
    __device__ __forceinline__ void feed() const {
        Filler<Ring> to(Ring::stages);
        if (elect_lane()) {
            Place place = work.at(Ring::stages);
#pragma unroll 1
            for (int i = Ring::stages; i < work.blocks; ++i) {
                barrier_wait(ring.empty(to.stage), to.parity);
                copy_weights(to.stage, to.fill, place);
                copy_activations(to.stage, to.fill, place);
                to.advance();
                place = work.at(i + 1); // not when the stage is empty: it would stay so meanwhile
            }
            if (problem.dependence == release_late) {
                release_dependents();
            }
        }
    }
};

} // namespace w4a16::decode
