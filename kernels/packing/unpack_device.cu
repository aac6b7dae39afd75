// Unpacks weights on the GPU: pack_device.cu the other way round, into the plain form.  The same holds for it: no
// griddepcontrol.launch_dependents.

#include "pack_device.h"
#include "tile.cuh"

namespace w4a16::packing {

__global__ void __launch_bounds__(tile_threads, 4) unpack_kernel(const Packed packed, const uint4 *from, Word *plain) {
    __shared__ Tile tile;
    const TilePlace place = tile_place(packed);
    const Share share(packed, place);
    uint4 vectors[Share::turns];
    // All loads are on their way before the first is used.
#pragma unroll
    for (int turn = 0; turn < Share::turns; ++turn) {
        vectors[turn] = turn < share.count ? __ldg(from + share.at(turn)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int turn = 0; turn < Share::turns; ++turn) {
        tile.at(share.column(turn), share.block) = vectors[turn];
    }
    __syncthreads();
    // A thread transposes 8 columns of 32 rows.
    const int word_column = threadIdx.x % tile_words;
    const int block = threadIdx.x / tile_words;
    if (place.first_block + block >= packed.k_blocks || place.first_column + 8 * word_column >= packed.n) {
        return;
    }
    Block columns[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        columns[i] = block_of(tile.at(8 * word_column + i, block));
    }
    const std::int64_t row_words = packed.n / 8;
    const std::int64_t first_row = std::int64_t{place.first_block + block} * block_rows;
    Word *const to = plain + first_row * row_words + place.first_column / 8 + word_column;
#pragma unroll
    for (int w = 0; w < 4; ++w) {
        Word words[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            words[i] = columns[i].words[w] ^ packed.flip;
        }
        transpose(words);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            to[row_at(packed.permuted, 8 * w + i) * row_words] = words[i];
        }
    }
}

void unpack_device(Layout layout, const std::uint8_t *packed, std::int64_t k, std::int64_t n, std::uint8_t *plain,
    CUstream_st *stream) {
    const Packed as = packed_as(layout, k, n);
    const auto tiles = static_cast<unsigned int>(tile_count(as));
    unpack_kernel<<<tiles, tile_threads, 0, stream>>>(as, reinterpret_cast<const uint4 *>(packed),
        reinterpret_cast<Word *>(plain));
}

} // namespace w4a16::packing
