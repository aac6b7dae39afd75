// Packs weights on the GPU.
//
// The kernel reads a tile of the source along its rows, rearranges nibbles in registers, and writes whole lines of the
// packed columns; where rows and columns of threads differ, the tile changes hands in shared memory.
//
// Never let this kernel trigger programmatic launch completion (griddepcontrol.launch_dependents): one that follows may
// prefetch weights *before* it waits for its dependencies, which is right only if packing ended before it began.

#include "pack_device.h"
#include "pack_parameters.cuh"

namespace w4a16::packing {

// A tile's rows in the source, by block and nibble: -1 for none.  One more place in each block keeps threads of
// different blocks in different banks.
using TileRows = int[tile_blocks][block_rows + 1];

inline __device__ void find_rows(const PackParameters &p, const TilePlace &place, TileRows &rows) {
    for (int i = threadIdx.x; i < tile_rows; i += tile_threads) {
        const int block = i / block_rows;
        const int nibble = i % block_rows;
        int row = -1;
        if (place.first_block + block < p.packed.k_blocks) {
            row = (place.first_block + block) * block_rows + row_at(p.packed.permuted, nibble);
            row = p.rows == nullptr ? row : __ldg(p.rows + row);
        }
        rows[block][nibble] = row >= 0 && row < p.source_k ? row : -1;
    }
}

// 8 bytes of 0..15 to a word.
inline __device__ Word joined(Word low, Word high) {
    constexpr Word nibble = 0x0f0f0f0fu;
    low &= nibble;
    high &= nibble;
    return __byte_perm(low | low >> 4, high | high >> 4, 0x6420);
}

// 8 columns of a row of bytes.
inline __device__ Word byte_row_word(const PackParameters &p, int row, int column) {
    const bool inside = row >= 0 && column < p.source_n;
    const std::uint8_t *const from = p.q + std::int64_t{row} * p.source_n + column;
    const uint2 found
        = inside ? __ldg(reinterpret_cast<const uint2 *>(from)) : make_uint2(0x08080808u, 0x08080808u);
    return joined(found.x, found.y);
}

// The same, if it can be read in bytes only, or ends within the word.
inline __device__ Word byte_row_word_by_bytes(const PackParameters &p, int row, int column) {
    const std::uint8_t *const from = p.q + std::int64_t{row} * p.source_n + column;
    Word word = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const bool inside = row >= 0 && column + i < p.source_n;
        word |= (inside ? __ldg(from + i) & 15u : Word{fill_nibble}) << (4 * i);
    }
    return word;
}

// 8 columns of a row of a plain or AWQ matrix.
inline __device__ Word row_word(const PackParameters &p, int row, int column) {
    const bool inside = row >= 0 && column < p.source_n;
    const std::uint8_t *const from = p.q + std::int64_t{row} * (p.source_n / 2) + column / 2;
    return inside ? __ldg(reinterpret_cast<const Word *>(from)) : fill_word;
}

// The same, if it can be read in bytes only, or ends within the word.
inline __device__ Word row_word_by_bytes(const PackParameters &p, int row, int column) {
    const std::uint8_t *const from = p.q + std::int64_t{row} * (p.source_n / 2) + column / 2;
    Word word = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const bool inside = row >= 0 && column + 2 * i < p.source_n;
        word |= (inside ? __ldg(from + i) : fill_word & 0xff) << (8 * i);
    }
    return word;
}

// A thread transposes 32 rows of 8 columns, where every word of q is there as a whole, at its place.
template <Format format>
__device__ void load_along_rows(const PackParameters &p, const TilePlace &place, const TileRows &rows, Tile &tile) {
    const int word_column = threadIdx.x % tile_words;
    const int block = threadIdx.x / tile_words;
    const int column = place.first_column + 8 * word_column;
    Word words[4][8];
    // All loads are on their way before the first is used.
#pragma unroll
    for (int i = 0; i < block_rows; ++i) {
        const int row = rows[block][i];
        words[i / 8][i % 8] = format == Format::bytes ? byte_row_word(p, row, column) : row_word(p, row, column);
    }
#pragma unroll
    for (auto &eight : words) {
        transpose(eight);
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const Block found{{words[0][i], words[1][i], words[2][i], words[3][i]}};
        const int at = 8 * word_column + (format == Format::awq ? awq_column(i) : i);
        tile.at(at, block) = vector_of(found, p.packed.flip);
    }
}

// The same from anywhere, 8 rows at a time: all at once are more loads than there are registers for.
template <Format format>
__device__ void load_along_rows_by_bytes(const PackParameters &p, const TilePlace &place, const TileRows &rows,
    Tile &tile) {
    static_assert(format == Format::plain || format == Format::bytes, "AWQ's words are always at their place");
    const int word_column = threadIdx.x % tile_words;
    const int block = threadIdx.x / tile_words;
    const int column = place.first_column + 8 * word_column;
#pragma unroll 1
    for (int part = 0; part < block_rows / 8; ++part) {
        Word words[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = rows[block][8 * part + i];
            words[i] = format == Format::bytes ? byte_row_word_by_bytes(p, row, column)
                                               : row_word_by_bytes(p, row, column);
        }
        transpose(words);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            reinterpret_cast<Word *>(&tile.at(8 * word_column + i, block))[part] = words[i] ^ p.packed.flip;
        }
    }
}

// The word of a GPTQ or compressed-tensors matrix that a row of a column is in.
template <Format format>
__device__ Word column_word(const PackParameters &p, int row, int column) {
    const std::int64_t at = format == Format::gptq
        ? std::int64_t{row >> 3} * p.source_n + column
        : std::int64_t{column} * (p.source_k / 8) + (row >> 3);
    return __ldg(reinterpret_cast<const Word *>(p.q) + at);
}

// Even nibbles to the lower half, odd ones to the upper half.
inline __device__ Word evens_first(Word word) {
    constexpr Word even = 0x0f0f0f0fu;
    const Word next = word >> 4;
    const Word evens = (word & even) | (next & ~even);     // bytes 0 and 2
    const Word odds = (next & even) | (word >> 8 & ~even); // likewise
    return __byte_perm(evens, odds, 0x6420);
}

// Rows in their order to rows as row_at() permutes them: byte w of each of the four words goes to word w.
inline __device__ Block permuted(const Block &block) {
    const Word (&words)[4] = block.words;
    const Word lower[2] = {__byte_perm(words[0], words[1], 0x5140), __byte_perm(words[2], words[3], 0x5140)};
    const Word upper[2] = {__byte_perm(words[0], words[1], 0x7362), __byte_perm(words[2], words[3], 0x7362)};
    return {{evens_first(__byte_perm(lower[0], lower[1], 0x5410)), evens_first(__byte_perm(lower[0], lower[1], 0x7632)),
        evens_first(__byte_perm(upper[0], upper[1], 0x5410)), evens_first(__byte_perm(upper[0], upper[1], 0x7632))}};
}

// 32 rows of a column, each from where `rows` says.
template <Format format>
__device__ Block block_gathered(const PackParameters &p, const int (&rows)[block_rows + 1], int column) {
    Block found{};
#pragma unroll
    for (int i = 0; i < block_rows; ++i) {
        const int row = rows[i];
        Word nibble = fill_nibble;
        if (row >= 0 && column < p.source_n) {
            nibble = column_word<format>(p, row, column) >> (row & 7) * 4 & 15;
        }
        found.words[i / 8] |= nibble << (i % 8 * 4);
    }
    return found;
}

inline __device__ uint4 packed_block(const Packed &packed, const Block &block) {
    return vector_of(packed.permuted ? permuted(block) : block, packed.flip);
}

// A thread packs its column of a GPTQ matrix.
inline __device__ void load_along_columns(const PackParameters &p, const TilePlace &place, const TileRows &rows,
    Tile &tile) {
    const int column = threadIdx.x;
    const int at = place.first_column + column;
    if (p.rows != nullptr) {
#pragma unroll 1
        for (int block = 0; block < tile_blocks; ++block) {
            tile.at(column, block) = vector_of(block_gathered<Format::gptq>(p, rows[block], at), p.packed.flip);
        }
        return;
    }
    const int first_word = place.first_block * (block_rows / 8);
    const int count = at < p.source_n ? p.source_k / 8 - first_word : 0;
    const Word *const from = reinterpret_cast<const Word *>(p.q) + std::int64_t{first_word} * p.source_n + at;
    Block blocks[tile_blocks];
    // All loads are on their way before the first is used.
#pragma unroll
    for (int i = 0; i < tile_rows / 8; ++i) {
        blocks[i / 4].words[i % 4] = i < count ? __ldg(from + std::int64_t{i} * p.source_n) : fill_word;
    }
#pragma unroll
    for (int block = 0; block < tile_blocks; ++block) {
        tile.at(column, block) = packed_block(p.packed, blocks[block]);
    }
}

// 32 rows of a column of a compressed-tensors matrix.  `aligned`: every block of q is there as a whole, at its place.
template <bool aligned>
__device__ Block source_block(const PackParameters &p, int block, int column) {
    const std::int64_t first_word = std::int64_t{column} * (p.source_k / 8) + block * 4;
    const int count = column < p.source_n ? p.source_k / 8 - block * 4 : 0;
    const Word *const from = reinterpret_cast<const Word *>(p.q) + first_word;
    if constexpr (aligned) {
        const uint4 fill = make_uint4(fill_word, fill_word, fill_word, fill_word);
        return block_of(count > 0 ? __ldg(reinterpret_cast<const uint4 *>(from)) : fill);
    } else {
        Block found;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            found.words[i] = i < count ? __ldg(from + i) : fill_word;
        }
        return found;
    }
}

// A thread's share of a compressed-tensors matrix lies where it lies in the packed weight.
template <bool aligned>
__device__ void copy_columns(const PackParameters &p, const TilePlace &place, const Share &share) {
    constexpr int together = 4;
    static_assert(Share::turns % together == 0, "no turn is left out");
#pragma unroll
    for (int first = 0; first < Share::turns; first += together) {
        Block blocks[together];
#pragma unroll
        for (int i = 0; i < together; ++i) {
            blocks[i] = source_block<aligned>(p, place.first_block + share.block,
                place.first_column + share.column(first + i));
        }
#pragma unroll
        for (int i = 0; i < together; ++i) {
            if (first + i < share.count) {
                p.out[share.at(first + i)] = packed_block(p.packed, blocks[i]);
            }
        }
    }
}

// 128 threads with 32 words in flight each: 4 of these blocks on an SM have more of them in flight than DRAM needs.
template <Format format, bool aligned>
__global__ void __launch_bounds__(tile_threads, 4) pack_kernel(const PackParameters p) {
    constexpr bool along_rows = format != Format::gptq && format != Format::compressed_tensors;
    __shared__ TileRows rows;
    const TilePlace place = tile_place(p.packed);
    if (along_rows || p.rows != nullptr) {
        find_rows(p, place, rows);
        __syncthreads();
    }
    const Share share(p.packed, place);
    if constexpr (format == Format::compressed_tensors) {
        if (p.rows == nullptr) {
            copy_columns<aligned>(p, place, share);
            return;
        }
#pragma unroll 1
        for (int turn = 0; turn < share.count; ++turn) {
            const Block found = block_gathered<format>(p, rows[share.block], place.first_column + share.column(turn));
            p.out[share.at(turn)] = vector_of(found, p.packed.flip);
        }
    } else {
        __shared__ Tile tile;
        if constexpr (format == Format::gptq) {
            load_along_columns(p, place, rows, tile);
        } else if constexpr (aligned) {
            load_along_rows<format>(p, place, rows, tile);
        } else {
            load_along_rows_by_bytes<format>(p, place, rows, tile);
        }
        __syncthreads();
        uint4 vectors[Share::turns];
#pragma unroll
        for (int turn = 0; turn < Share::turns; ++turn) {
            vectors[turn] = tile.at(share.column(turn), share.block);
        }
#pragma unroll
        for (int turn = 0; turn < Share::turns; ++turn) {
            if (turn < share.count) {
                p.out[share.at(turn)] = vectors[turn];
            }
        }
    }
}

void pack_device(Layout layout, const Source &source, std::int64_t k, std::int64_t n, std::uint8_t *packed,
    CUstream_st *stream) {
    PackParameters parameters{};
    parameters.q = source.q;
    parameters.rows = source.rows;
    parameters.source_k = static_cast<int>(source.k);
    parameters.source_n = static_cast<int>(source.n);
    parameters.packed = packed_as(layout, k, n);
    parameters.out = reinterpret_cast<uint4 *>(packed);
    const auto tiles = static_cast<unsigned int>(tile_count(parameters.packed));
    const auto launch = [&](auto kernel) { kernel<<<tiles, tile_threads, 0, stream>>>(parameters); };
    const auto address = reinterpret_cast<std::uintptr_t>(source.q);
    const bool down_columns = source.format == Format::gptq || source.format == Format::compressed_tensors;
    if (down_columns && source.rows != nullptr && pack_picked_device(parameters, source.format, stream)) {
        return;
    }
    switch (source.format) {
    case Format::plain: {
        const bool aligned = address % sizeof(Word) == 0 && source.n % 8 == 0;
        launch(aligned ? pack_kernel<Format::plain, true> : pack_kernel<Format::plain, false>);
        break;
    }
    case Format::bytes: {
        const bool aligned = address % sizeof(uint2) == 0 && source.n % 8 == 0;
        launch(aligned ? pack_kernel<Format::bytes, true> : pack_kernel<Format::bytes, false>);
        break;
    }
    case Format::gptq:
        launch(pack_kernel<Format::gptq, true>);
        break;
    case Format::awq:
        launch(pack_kernel<Format::awq, true>);
        break;
    case Format::compressed_tensors: {
        const bool aligned = address % sizeof(uint4) == 0 && source.k % block_rows == 0;
        launch(aligned ? pack_kernel<Format::compressed_tensors, true>
                       : pack_kernel<Format::compressed_tensors, false>);
        break;
    }
    }
}

} // namespace w4a16::packing
