// What packing and unpacking on the GPU share: tiles of 256 rows x 128 columns of nibbles, 128 bytes of each packed
// column, which are one cache line where columns are contiguous.

#pragma once

#include "pack.h"

#include <cstdint>

#include <cuda_runtime.h>

namespace w4a16::packing {

using Word = std::uint32_t; // 8 nibbles

constexpr int block_rows = 32; // of one column: 16 packed bytes
constexpr int tile_blocks = 8;
constexpr int tile_rows = tile_blocks * block_rows;
constexpr int tile_columns = 128;
constexpr int tile_words = tile_columns / 8; // of a row
constexpr int tile_threads = tile_words * tile_blocks;
constexpr Word fill_word = 0x11111111u * fill_nibble;

static_assert(tile_threads == tile_columns, "a thread stands for a column, or for a word of a row and a block");

// The four words of a block: rows row_at(.., 8 w) to row_at(.., 8 w + 7) of 32.
struct Block {
    Word words[4];
};

inline __device__ uint4 vector_of(const Block &block, Word flip) {
    return make_uint4(block.words[0] ^ flip, block.words[1] ^ flip, block.words[2] ^ flip, block.words[3] ^ flip);
}

inline __device__ Block block_of(uint4 vector) {
    return {{vector.x, vector.y, vector.z, vector.w}};
}

// A tile's blocks in shared memory.  Neighbouring columns, every eighth column, and the blocks of one column are each
// accessed by 8 threads at a time: all three ways touch every bank once.
struct Tile {
    uint4 blocks[tile_columns * tile_blocks];

    __device__ uint4 &at(int column, int block) {
        return blocks[column * tile_blocks + (block ^ ((column ^ column >> 3) & 7))];
    }
};

// The packed weight, in blocks.
struct Packed {
    int k_blocks; // k / 32
    int n;
    bool permuted;
    bool interleaved;
    Word flip; // xor on every word: 0x88888888 turns unsigned nibbles into signed ones

    __device__ std::int64_t block_at(int column, int block) const {
        const std::int64_t blocks = k_blocks;
        return interleaved ? column / 4 * (4 * blocks) + block / 2 * 8 + column % 4 * 2 + block % 2
                           : column * blocks + block;
    }
};

inline Packed packed_as(Layout layout, std::int64_t k, std::int64_t n) {
    const bool natural = layout == Layout::column_signed;
    return {static_cast<int>(k / block_rows), static_cast<int>(n), !natural, layout == Layout::interleaved,
        natural ? 0x88888888u : 0u};
}

// Where a tile begins, in blocks and columns.  Consecutive tiles go down the columns: their lines are neighbours in the
// packed weight.
struct TilePlace {
    int first_block;
    int first_column;
};

inline __device__ TilePlace tile_place(const Packed &packed) {
    const unsigned int tiles_down = (packed.k_blocks + tile_blocks - 1) / tile_blocks;
    return {static_cast<int>(blockIdx.x % tiles_down) * tile_blocks,
        static_cast<int>(blockIdx.x / tiles_down) * tile_columns};
}

inline std::int64_t tile_count(const Packed &packed) {
    const std::int64_t tiles_down = (packed.k_blocks + tile_blocks - 1) / tile_blocks;
    return tiles_down * ((std::int64_t{packed.n} + tile_columns - 1) / tile_columns);
}

// A thread's share of a tile's packed blocks: 8 threads have a line of a column, a warp those of four neighbouring
// columns, which is contiguous in either layout.
struct Share {
    static constexpr int step = tile_threads / tile_blocks;
    static constexpr int turns = tile_columns / step;

    int block;             // of the tile
    int first;             // column of the tile
    int count;             // of turns that are inside the weight
    std::int64_t first_at; // where the first block is in the packed weight
    std::int64_t stride;   // to the next

    __device__ Share(const Packed &packed, const TilePlace &place)
        : block(threadIdx.x % tile_blocks)
        , first(threadIdx.x / tile_blocks)
        , count(0)
        , first_at(packed.block_at(place.first_column + first, place.first_block + block))
        , stride(std::int64_t{step} * packed.k_blocks) {
        static_assert(step % 4 == 0, "interleaving leaves steps of whole groups of columns where they are");
        const int columns = packed.n - place.first_column - first;
        if (place.first_block + block < packed.k_blocks && columns > 0) {
            count = min(turns, (columns + step - 1) / step);
        }
    }

    __device__ int column(int turn) const { return first + turn * step; }
    __device__ std::int64_t at(int turn) const { return first_at + turn * stride; }
};

// Nibble j of word i becomes nibble i of word j.
inline __device__ void transpose(Word (&words)[8]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Word upper = words[i];
        const Word lower = words[i + 4];
        words[i] = __byte_perm(upper, lower, 0x5410);
        words[i + 4] = __byte_perm(upper, lower, 0x7632);
    }
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
        const int i = pair / 2 * 4 + pair % 2;
        const Word upper = words[i];
        const Word lower = words[i + 2];
        words[i] = __byte_perm(upper, lower, 0x6240);
        words[i + 2] = __byte_perm(upper, lower, 0x7351);
    }
#pragma unroll
    for (int i = 0; i < 8; i += 2) {
        constexpr Word even = 0x0f0f0f0fu;
        const Word upper = words[i];
        const Word lower = words[i + 1];
        words[i] = (upper & even) | (lower << 4 & ~even);
        words[i + 1] = (upper >> 4 & even) | (lower & ~even);
    }
}

} // namespace w4a16::packing
