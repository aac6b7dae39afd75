// The wide kernel with the stages of its tiles dealt out evenly (stream-K): every CTA has as much to do as any other,
// however many tiles there are.
//
// A CTA begins and ends in the middle of a tile.  The CTA that has a tile's first part finishes it; the others leave their
// sums in the workspace, in their lanes' order, with a ticket that no other launch has.  CTAs are counted from the end: a
// tile's first part is the last thing that a CTA does, and the parts that it waits for are the first things that CTAs
// before it do.  So they are there already, or soon; and where not all CTAs run at once, nobody waits for one that has not
// started, since CTAs start in their order.

#pragma once

#include "wide.h"

#include <climits>

namespace w4a16::decode {

// Of numbers from 0 on.
__device__ __forceinline__ int operator/(int number, const Divisor &by) {
    const auto high = __umulhi(static_cast<std::uint32_t>(number), by.factor);
    return by.value == 1 ? number : static_cast<int>(high >> by.shift);
}

__device__ __forceinline__ int own_cta() { return static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x); }

// Of all streamed stages, the first one of a CTA; the next CTA's follow on its last one.
__device__ __forceinline__ int first_block_of(const Streams &streams, int cta) {
    return cta * streams.least + min(cta, streams.more);
}

// Whether the sums of others are there when a CTA ends its part of their tile: then they pass through its ring like any
// stage, and nobody waits for memory.  Where CTAs have less than a tile, some sums come last, and their way must be short.
__device__ __forceinline__ bool sums_are_early(const Streams &streams) {
    return streams.least >= streams.blocks_of_tile.value;
}

// A tile, of those that CTAs have as a whole.
__device__ __forceinline__ int whole_tile(const Streams &streams, int i) {
    return streams.streamed + i * static_cast<int>(gridDim.x) + own_cta();
}

// What one CTA works on: `part` streamed stages, then those of whole tiles.
template <typename Shape>
struct StreamWork {
    const Streams &streams;
    int first_block;
    int part;
    int blocks; // of the ring's first round: up to where the sums of others come through it

    __device__ __forceinline__ explicit StreamWork(const Streams &streams)
        : streams(streams), first_block(first_block_of(streams, own_cta())),
          part(first_block_of(streams, own_cta() + 1) - first_block),
          blocks(part + (gathers() ? 0 : streams.whole * streams.blocks_of_tile.value)) {}

    // Where the tile begins that its streamed part ends in, or that follows.
    __device__ __forceinline__ int last_tile() const {
        return (first_block + part) / streams.blocks_of_tile * streams.blocks_of_tile.value;
    }
    // Whether it has the first part of that tile, and others have the rest.
    __device__ __forceinline__ bool gathers() const {
        return last_tile() < first_block + part && last_tile() >= first_block;
    }

    __device__ __forceinline__ Place at(int i) const {
        const int block = i < part ? first_block + i : i - part;
        const int nth = block / streams.blocks_of_tile;
        const int tile = i < part ? nth : whole_tile(streams, nth);
        const int row_tile = tile / streams.token_tiles;
        return {row_tile * Shape::rows, (tile - row_tile * streams.token_tiles.value) * Shape::tokens,
            block - nth * streams.blocks_of_tile.value};
    }
};

constexpr int sums_left_barrier = 2; // of all consumers, and the warp that hands out the ticket for them

// How the sums of a CTA lie in the workspace, and pass through stages: a lane of a consumer has four at a time.
template <typename Shape>
struct Sums {
    static constexpr int warps = Shape::warpgroups * 4;
    static constexpr int quads = Shape::tokens / 8;
    static constexpr int quad_bytes = Shape::consumers * 16; // of all lanes
    static constexpr int bytes = quads * quad_bytes;
    static constexpr int quads_of_stage
        = Shape::Ring::tile_bytes / quad_bytes < quads ? Shape::Ring::tile_bytes / quad_bytes : quads;
    static_assert(quads_of_stage > 0, "sums pass through stages");

    // The workspace begins with the tickets of each CTA's warps: that of the launch whose sums are there.
    static __device__ __forceinline__ std::uint64_t *ticket(const Streams &streams, int cta, int warp) {
        return static_cast<std::uint64_t *>(streams.workspace) + cta * warps + warp;
    }
    static __device__ __forceinline__ unsigned char *of(const Streams &streams, int cta) {
        return reinterpret_cast<unsigned char *>(ticket(streams, gridDim.x, 0)) + static_cast<std::size_t>(cta) * bytes;
    }

    // For the CTA that finishes the tile.
    static __device__ __forceinline__ void leave(const WideSums<Shape> &sums, const Streams &streams, int warp) {
        float4 *const to = reinterpret_cast<float4 *>(of(streams, own_cta())) + threadIdx.x;
#pragma unroll
        for (int i = 0; i < quads; ++i) {
            __stcg(to + i * Shape::consumers,
                make_float4(sums.total[4 * i], sums.total[4 * i + 1], sums.total[4 * i + 2], sums.total[4 * i + 3]));
        }
        if (sums_are_early(streams)) { // a warp that multiplies need not wait until its sums have arrived
            arrive_at_threads(sums_left_barrier, Shape::consumers + warp_size);
        } else {
            __syncwarp();
            store_release_by_warp(ticket(streams, own_cta(), warp), streams.ticket);
        }
    }
};

// By one lane: refills stages with what is left of the streamed part, then with the sums that finish its last tile, then
// with whole tiles.
template <typename Shape, typename Source>
__device__ __forceinline__ void streaming_feed(const Source &source, const StreamWork<Shape> &work) {
    using Ring = typename Shape::Ring;
    const Streams &streams = work.streams;
    const Ring &ring = source.ring;
    const int begun = min(work.blocks, Ring::stages);
    Filler<Ring> to(begun);
    const auto products = [&](int first, int end) {
        Place place = work.at(first);
#pragma unroll 1
        for (int i = first; i < end; ++i) {
            barrier_wait(ring.empty(to.stage), to.parity);
            source.copy_weights(to.stage, to.fill, place);
            source.copy_activations(to.stage, to.fill, place);
            to.advance();
            place = work.at(i + 1); // not when the stage is empty: it would stay so meanwhile
        }
    };
    const bool late = source.problem.dependence == release_late;
    int next = begun;
    if (next < work.part) {
        products(next, work.part);
        next = work.part;
    }
    if (late && streams.whole == 0) { // all weights were asked for
        release_dependents();
    }
    const int end = work.gathers() && sums_are_early(streams) ? work.last_tile() + streams.blocks_of_tile.value : 0;
    for (int cta = own_cta() + 1; first_block_of(streams, cta) < end; ++cta) {
        std::uint64_t *const ticket = Sums<Shape>::ticket(streams, cta, 0);
        while (load_acquire(ticket) != streams.ticket) {
        }
        *ticket = 0; // the next launch may be this one, replayed
        copies_fence();
#pragma unroll 1
        for (int i = 0; i < Sums<Shape>::quads; i += Sums<Shape>::quads_of_stage) {
            const int bytes = min(Sums<Shape>::quads - i, Sums<Shape>::quads_of_stage) * Sums<Shape>::quad_bytes;
            barrier_wait(ring.empty(to.stage), to.parity);
            barrier_arrive_expecting(ring.full(to.fill), bytes);
            copy_bytes(ring.weights(to.stage), Sums<Shape>::of(streams, cta) + i * Sums<Shape>::quad_bytes, bytes,
                ring.full(to.fill));
            to.advance();
        }
    }
    products(next, work.part + streams.whole * streams.blocks_of_tile.value);
    if (late && streams.whole > 0) {
        release_dependents();
    }
}

template <typename Shape>
__device__ __forceinline__ void add(WideSums<Shape> &sums, int quad, float4 part) {
    sums.total[4 * quad] += part.x;
    sums.total[4 * quad + 1] += part.y;
    sums.total[4 * quad + 2] += part.z;
    sums.total[4 * quad + 3] += part.w;
}

// Adds what the same warp of another CTA leaves, as soon as it is there.
template <typename Shape>
__device__ __forceinline__ void await_sums(WideSums<Shape> &sums, const Streams &streams, int cta, int warp) {
    std::uint64_t *const ticket = Sums<Shape>::ticket(streams, cta, warp);
    while (__any_sync(0xffffffffu, load_acquire(ticket) != streams.ticket)) {
    }
    store_by_warp(ticket, 0); // the next launch may be this one, replayed
    const float4 *const from = reinterpret_cast<const float4 *>(Sums<Shape>::of(streams, cta)) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < Sums<Shape>::quads; ++i) {
        add(sums, i, __ldcg(from + i * Shape::consumers));
    }
}

// Adds what another CTA left, and the ring brings.
template <typename Shape>
__device__ __forceinline__ void add_sums(WideWarp<Shape> &own) {
    constexpr int quads = Sums<Shape>::quads;
    constexpr int at_once = Sums<Shape>::quads_of_stage;
#pragma unroll
    for (int first = 0; first < quads; first += at_once) {
        __syncwarp();
        barrier_arrive_by_warp(own.ring.empty(own.last_stage));
        barrier_wait(own.ring.full(own.cursor.fill), own.cursor.parity);
        const std::uint32_t from = own.ring.weights(own.cursor.stage) + threadIdx.x * 16;
#pragma unroll
        for (int i = first; i < quads && i < first + at_once; ++i) {
            add(own.sums, i, load_floats(from + (i - first) * Sums<Shape>::quad_bytes));
        }
        own.last_stage = own.cursor.stage;
        own.cursor.advance(1);
    }
}

// Writes a tile's outputs.  A lane has pairs of tokens, and they lie along N: so 8 by 8 outputs change places at a time.
template <typename Shape>
__device__ __forceinline__ void write_outputs(const WideSums<Shape> &sums, const Problem &problem, int first_column,
    int first_token, int lane) {
#pragma unroll
    for (int side = 0; side < 2; ++side) {
        const int column = first_column + side * 8;
        const bool present = column < problem.n;
        const float bias
            = problem.bias != nullptr && present ? __half2float(problem.bias[column + lane / 4]) : 0.f;
        const int token = first_token + lane / 4;
        __half *to = problem.place(token, column + lane % 4 * 2);
        const std::ptrdiff_t step = problem.place(8, column) - problem.place(0, column);
#pragma unroll
        for (int i = 0; i < Shape::tokens / 8; ++i) {
            const std::uint32_t pair = transposed(bits_of(
                __floats2half2_rn(sums.total[4 * i + 2 * side] + bias, sums.total[4 * i + 2 * side + 1] + bias)));
            store_word(to, pair, present && token + 8 * i < problem.m);
            to += step;
        }
    }
}

template <typename Shape>
__global__ void __launch_bounds__(Shape::threads, Shape::ctas_per_sm)
    streaming_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
        const __grid_constant__ CUtensorMap scales, const __grid_constant__ CUtensorMap zeros, const Problem problem) {
    using Ring = typename Shape::Ring;
    static_assert(Shape::streams > 0 && Shape::sets == 1, "each warp's sums are whole");
    extern __shared__ __align__(1024) unsigned char shared[];
    const Ring ring{shared_address(shared)};
    const int lane = threadIdx.x % warp_size;
    const int warp = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / warp_size), 0); // makes it uniform
    const Streams &streams = problem.streams;
    const StreamWork<Shape> work(streams);

    if (problem.dependence == release_early) {
        release_dependents();
    }
    const Source<Ring, Shape::zeros, StreamWork<Shape>> source{
        ring, {&weights, &activations, &scales, &zeros}, problem, work, Ring::activation_bytes};
    const auto beside = [&](int other) {
        if (other == 0 && elect_lane()) {
            streaming_feed<Shape>(source, work);
        }
        if (other == 1 && sums_are_early(streams)
            && work.first_block / streams.blocks_of_tile * streams.blocks_of_tile.value != work.first_block) {
            sync_threads(sums_left_barrier, Shape::consumers + warp_size);
            store_release_by_warp(Sums<Shape>::ticket(streams, own_cta(), 0), streams.ticket);
        }
    };
    if (!wide_begin<Shape>(source, warp, beside)) {
        return;
    }
    WideWarp<Shape> own(ring, problem, warp, lane);
    own.begin();
    // No branch in this loop that ptxas cannot see all lanes take: it would keep all that is uniform in the loop inside in
    // vector registers, which costs a third more instructions.
    int block = first_block_of(streams, own_cta());
    const int last = first_block_of(streams, own_cta() + 1);
    int tile = block / streams.blocks_of_tile;
    for (int whole = 0; block < last || whole < streams.whole; ++tile) {
        const bool streamed = block < last;
        if (!streamed) {
            block = 0;
            tile = whole_tile(streams, whole++);
        }
        const int first_of_tile = tile * streams.blocks_of_tile.value;
        const int end_of_tile = (streamed ? first_of_tile : 0) + streams.blocks_of_tile.value;
        const int end = streamed ? min(last, end_of_tile) : end_of_tile;
        const bool unfinished = end < end_of_tile;
        const bool more = (streamed && end < last) || whole < streams.whole;
        own.multiply(block, end, more && !unfinished ? INT_MAX : end);
        if (streamed && first_of_tile < first_block_of(streams, own_cta())) {
            Sums<Shape>::leave(own.sums, streams, warp);
        } else {
            if (unfinished) {
                for (int cta = own_cta() + 1; first_block_of(streams, cta) < end_of_tile; ++cta) {
                    if (sums_are_early(streams)) {
                        add_sums<Shape>(own);
                    } else {
                        await_sums<Shape>(own.sums, streams, cta, warp);
                    }
                }
            }
            const int row_tile = tile / streams.token_tiles;
            write_outputs<Shape>(own.sums, problem, row_tile * Shape::rows + warp / 4 * 64 + warp % 4 * 16,
                (tile - row_tile * streams.token_tiles.value) * Shape::tokens, lane);
        }
        own.sums = {};
        if (more && unfinished) {
            own.begin();
        }
        block = streamed ? end : last;
    }
}

} // namespace w4a16::decode
