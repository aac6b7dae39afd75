// Packs weights in tiles of 128 x 128 nibbles: a transposition of 16 x 16 blocks in 64-bit words.

#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <thread>
#include <vector>

namespace w4a16::packing {
namespace {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "nibble order within words assumes little endian");

using Word = std::uint64_t; // 16 nibbles

// One cache line of a row of the plain matrix, and of a column of the packed one.  Moving whole lines through small
// buffers keeps power-of-two strides from throwing each other out of the cache.
constexpr int tile_extent = 128;
constexpr int line_words = tile_extent / 16;
constexpr int line_bytes = tile_extent / 2;

struct Tile {
    alignas(64) Word lines[tile_extent][line_words];
};

// Which of 32 rows stands at which nibble of their 16 bytes.
struct RowOrder {
    std::uint8_t row[32];
};

constexpr RowOrder natural_order() {
    RowOrder order{};
    for (int nibble = 0; nibble < 32; ++nibble) {
        order.row[nibble] = static_cast<std::uint8_t>(nibble);
    }
    return order;
}

// A 32-bit word w of the four holds rows 2w and 2w + 1 of each 8: the pairs that one thread feeds to an MMA.  All even
// rows come first, so that masking a register gives two values a half2 apart.
constexpr RowOrder permuted_order() {
    RowOrder order{};
    for (int nibble = 0; nibble < 32; ++nibble) {
        const int word = nibble / 8;
        const int place = nibble % 8;
        order.row[nibble] = static_cast<std::uint8_t>(2 * word + place / 4 + 8 * (place % 4));
    }
    return order;
}

struct Traits {
    RowOrder order;
    Word flip; // xor on every nibble: 8 turns unsigned into signed
    bool interleaved;
};

Traits traits_of(Layout layout) {
    switch (layout) {
    case Layout::column_signed:
        return {natural_order(), 0x8888888888888888u, false};
    case Layout::interleaved:
        return {permuted_order(), 0, true};
    case Layout::column_permuted:
        break;
    }
    return {permuted_order(), 0, false};
}

// Transposes `line_words` blocks of 16 x 16 nibbles at once; its own inverse.  Each step swaps the off-diagonal halves
// of ever smaller blocks.
template <int distance>
void transpose_step(Word (&block)[16][line_words], Word mask) {
    for (int i = 0; i < 16; ++i) {
        if ((i & distance) != 0) {
            continue;
        }
        for (int lane = 0; lane < line_words; ++lane) {
            Word &upper = block[i][lane];
            Word &lower = block[i + distance][lane];
            const Word difference = ((upper >> (4 * distance)) ^ lower) & mask;
            lower ^= difference;
            upper ^= difference << (4 * distance);
        }
    }
}

void transpose(Word (&block)[16][line_words]) {
    transpose_step<8>(block, 0x00000000ffffffffu);
    transpose_step<4>(block, 0x0000ffff0000ffffu);
    transpose_step<2>(block, 0x00ff00ff00ff00ffu);
    transpose_step<1>(block, 0x0f0f0f0f0f0f0f0fu);
}

// Rows of the plain tile to columns of the packed tile.
void rows_to_columns(const Tile &rows, Tile &columns, const Traits &traits) {
    for (int part = 0; part < line_words; ++part) { // 16 rows each, half of a permuted 32
        alignas(64) Word block[16][line_words];
        const int first_row = part / 2 * 32;
        for (int i = 0; i < 16; ++i) {
            const Word(&line)[line_words] = rows.lines[first_row + traits.order.row[part % 2 * 16 + i]];
            for (int lane = 0; lane < line_words; ++lane) {
                block[i][lane] = line[lane] ^ traits.flip;
            }
        }
        transpose(block);
        for (int lane = 0; lane < line_words; ++lane) {
            for (int i = 0; i < 16; ++i) {
                columns.lines[lane * 16 + i][part] = block[i][lane];
            }
        }
    }
}

void columns_to_rows(const Tile &columns, Tile &rows, const Traits &traits) {
    for (int part = 0; part < line_words; ++part) {
        alignas(64) Word block[16][line_words];
        const int first_row = part / 2 * 32;
        for (int lane = 0; lane < line_words; ++lane) {
            for (int i = 0; i < 16; ++i) {
                block[i][lane] = columns.lines[lane * 16 + i][part] ^ traits.flip;
            }
        }
        transpose(block);
        for (int i = 0; i < 16; ++i) {
            Word(&line)[line_words] = rows.lines[first_row + traits.order.row[part % 2 * 16 + i]];
            for (int lane = 0; lane < line_words; ++lane) {
                line[lane] = block[i][lane];
            }
        }
    }
}

struct Matrix {
    std::int64_t k;
    std::int64_t n;
};

// A tile's place in the matrix; at the lower and right edges it is smaller than tile_extent.
struct Window {
    std::int64_t row;
    std::int64_t column;
    int rows;    // 64 or 128
    int columns; // a multiple of 8
};

// Calls visit(byte offset in the packed weight, column of the tile, first byte of its line, bytes) for each contiguous
// piece.
template <typename Visit>
void for_each_piece(const Matrix &matrix, const Window &window, bool interleaved, Visit visit) {
    const std::int64_t column_bytes = matrix.k / 2;
    for (int column = 0; column < window.columns; ++column) {
        const std::int64_t at = window.column + column;
        if (!interleaved) {
            visit(at * column_bytes + window.row / 2, column, 0, window.rows / 2);
            continue;
        }
        for (int row = 0; row < window.rows; row += 64) {
            const std::int64_t block = (window.row + row) / 64;
            visit(at / 4 * (4 * column_bytes) + block * 128 + at % 4 * 32, column, row / 2, 32);
        }
    }
}

// Runs work(window) over all tiles.  Threads take runs of tiles down the columns, so that each writes to few pages.
template <typename Work>
void for_each_tile(const Matrix &matrix, int threads, Work work) {
    const std::int64_t down = (matrix.k + tile_extent - 1) / tile_extent;
    const std::int64_t across = (matrix.n + tile_extent - 1) / tile_extent;
    const std::int64_t run = std::min<std::int64_t>(down, 16);
    const std::int64_t runs_down = (down + run - 1) / run;
    std::atomic<std::int64_t> next{0};
    const auto drain = [&] {
        for (std::int64_t index = next++; index < runs_down * across; index = next++) {
            const std::int64_t column = index / runs_down * tile_extent;
            const std::int64_t first = index % runs_down * run;
            for (std::int64_t tile = first; tile < std::min(first + run, down); ++tile) {
                const std::int64_t row = tile * tile_extent;
                work(Window{row, column, static_cast<int>(std::min<std::int64_t>(tile_extent, matrix.k - row)),
                    static_cast<int>(std::min<std::int64_t>(tile_extent, matrix.n - column))});
            }
        }
    };

    std::int64_t count = threads > 0 ? threads : static_cast<std::int64_t>(std::thread::hardware_concurrency());
    count = std::max<std::int64_t>(1, std::min(count, runs_down * across));
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(count - 1));
    try {
        while (static_cast<std::int64_t>(helpers.size()) < count - 1) {
            helpers.emplace_back(drain);
        }
    } catch (const std::exception &) {
        // No more threads, or memory for one: those that run, and this one, do the work.
    }
    drain();
    for (std::thread &helper : helpers) {
        helper.join();
    }
}

} // namespace

void pack(Layout layout, const std::uint8_t *plain, std::int64_t k, std::int64_t n, std::uint8_t *packed, int threads) {
    const Traits traits = traits_of(layout);
    const Matrix matrix{k, n};
    for_each_tile(matrix, threads, [&](const Window &window) {
        Tile rows;
        Tile columns;
        for (int row = 0; row < tile_extent; ++row) {
            Word(&line)[line_words] = rows.lines[row];
            if (row < window.rows) {
                const std::uint8_t *source = plain + (window.row + row) * (n / 2) + window.column / 2;
                if (window.columns == tile_extent) {
                    std::memcpy(line, source, line_bytes);
                    continue;
                }
                std::memset(line, 0, line_bytes);
                std::memcpy(line, source, static_cast<std::size_t>(window.columns / 2));
            } else {
                std::memset(line, 0, line_bytes);
            }
        }
        rows_to_columns(rows, columns, traits);
        for_each_piece(matrix, window, traits.interleaved, [&](std::int64_t offset, int column, int first, int bytes) {
            const auto *line = reinterpret_cast<const std::uint8_t *>(columns.lines[column]);
            std::memcpy(packed + offset, line + first, static_cast<std::size_t>(bytes));
        });
    });
}

void unpack(Layout layout, const std::uint8_t *packed, std::int64_t k, std::int64_t n, std::uint8_t *plain,
    int threads) {
    const Traits traits = traits_of(layout);
    const Matrix matrix{k, n};
    for_each_tile(matrix, threads, [&](const Window &window) {
        Tile rows;
        Tile columns;
        if (window.rows < tile_extent || window.columns < tile_extent) {
            std::memset(&columns, 0, sizeof columns);
        }
        for_each_piece(matrix, window, traits.interleaved, [&](std::int64_t offset, int column, int first, int bytes) {
            auto *line = reinterpret_cast<std::uint8_t *>(columns.lines[column]);
            std::memcpy(line + first, packed + offset, static_cast<std::size_t>(bytes));
        });
        columns_to_rows(columns, rows, traits);
        for (int row = 0; row < window.rows; ++row) {
            std::memcpy(plain + (window.row + row) * (n / 2) + window.column / 2, rows.lines[row],
                static_cast<std::size_t>(window.columns / 2));
        }
    });
}

} // namespace w4a16::packing
