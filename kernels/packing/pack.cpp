// Packs weights on the CPU, in tiles of 128 x 128 nibbles.  What lies along the rows is transposed, in blocks of 16 x
// 16 nibbles; what lies along the columns already needs no more than the nibbles of each 16 bytes rearranged.

#include "pack.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstring>
#include <exception>
#include <iterator>
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

struct Traits {
    bool permuted;
    Word flip; // xor on every nibble: 8 turns unsigned into signed
    bool interleaved;
};

constexpr Word fill_word = 0x1111111111111111u * fill_nibble;
constexpr int fill_byte = 0x11 * fill_nibble;

constexpr Traits traits_of(Layout layout) {
    switch (layout) {
    case Layout::column_signed:
        return {false, 0x8888888888888888u, false};
    case Layout::interleaved:
        return {true, 0, true};
    case Layout::column_permuted:
        break;
    }
    return {true, 0, false};
}

// Rows in their order and unchanged.
constexpr Traits natural{false, 0, false};

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

// Rows of the plain tile to columns of the packed tile; in AWQ's order of columns if the rows are.
void rows_to_columns(const Tile &rows, Tile &columns, const Traits &traits, bool awq) {
    for (int part = 0; part < line_words; ++part) { // 16 rows each, half of a permuted 32
        alignas(64) Word block[16][line_words];
        const int first_row = part / 2 * 32;
        for (int i = 0; i < 16; ++i) {
            const Word(&line)[line_words] = rows.lines[first_row + row_at(traits.permuted, part % 2 * 16 + i)];
            for (int lane = 0; lane < line_words; ++lane) {
                block[i][lane] = line[lane] ^ traits.flip;
            }
        }
        transpose(block);
        for (int lane = 0; lane < line_words; ++lane) {
            for (int i = 0; i < 16; ++i) {
                const int column = awq ? i / 8 * 8 + awq_column(i % 8) : i;
                columns.lines[lane * 16 + column][part] = block[i][lane];
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
            Word(&line)[line_words] = rows.lines[first_row + row_at(traits.permuted, part % 2 * 16 + i)];
            for (int lane = 0; lane < line_words; ++lane) {
                line[lane] = block[i][lane];
            }
        }
    }
}

// Swaps nibbles whose index has bit `high` set and bit `low` clear with those that have it the other way round, where
// `mask` selects the ones with `low` alone.
template <int high, int low>
Word swap_index_bits(Word word, Word mask) {
    constexpr int shift = 4 * ((1 << high) - (1 << low));
    const Word difference = ((word >> shift) ^ word) & mask;
    return word ^ difference ^ (difference << shift);
}

// Rows in their order to rows as row_at() permutes them, in each 32.  Bits 4..0 of a nibble's index are r1 r0 w1 w0 h
// in row 8r + 2w + h, and become w1 w0 h r1 r0: a rotation, in four exchanges of two bits.
void permute(Tile &columns) {
    for (auto &line : columns.lines) {
        for (int part = 0; part < line_words; part += 2) {
            Word low = line[part];
            Word high = line[part + 1];
            const Word difference = ((low >> 16) ^ high) & 0x0000ffff0000ffffu; // bits 4 and 2: w1 r0 r1 w0 h
            high ^= difference;
            low ^= difference << 16;
            for (Word *const word : {&low, &high}) {
                Word x = swap_index_bits<3, 1>(*word, 0x00000000ff00ff00u); // w1 w0 r1 r0 h
                x = swap_index_bits<1, 0>(x, 0x00f000f000f000f0u);          // w1 w0 r1 h r0
                x = swap_index_bits<2, 1>(x, 0x0000ff000000ff00u);          // w1 w0 h r1 r0
                *word = x;
            }
            line[part] = low;
            line[part + 1] = high;
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

// How many threads are to share `items`.
int thread_count(int threads, std::int64_t items) {
    const std::int64_t wanted = threads > 0 ? threads : static_cast<std::int64_t>(std::thread::hardware_concurrency());
    return static_cast<int>(std::max<std::int64_t>(1, std::min(wanted, items)));
}

// Calls work(item, thread) for each item, `threads` at a time.
template <typename Work>
void share(std::int64_t items, int threads, Work work) {
    std::atomic<std::int64_t> next{0};
    const auto drain = [&](int thread) {
        for (std::int64_t item = next++; item < items; item = next++) {
            work(item, thread);
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(static_cast<std::size_t>(threads - 1));
    try {
        while (static_cast<int>(helpers.size()) < threads - 1) {
            helpers.emplace_back(drain, static_cast<int>(helpers.size()) + 1);
        }
    } catch (const std::exception &) {
        // No more threads, or memory for one: those that run, and this one, do the work.
    }
    drain(0);
    for (std::thread &helper : helpers) {
        helper.join();
    }
}

constexpr std::int64_t tiles_in(std::int64_t extent) {
    return (extent + tile_extent - 1) / tile_extent;
}

Window window_at(const Matrix &matrix, std::int64_t row, std::int64_t column) {
    return {row, column, static_cast<int>(std::min<std::int64_t>(tile_extent, matrix.k - row)),
        static_cast<int>(std::min<std::int64_t>(tile_extent, matrix.n - column))};
}

// A thread takes tiles in runs down the columns, so that it writes to few pages, and loads a whole run before it writes
// it: lines far apart cost up to twice as much if they are read and written by turns.
constexpr int run_tiles = 16;

struct Run {
    Window windows[run_tiles];
    int count;
};

constexpr std::int64_t runs_down(const Matrix &matrix) {
    return (tiles_in(matrix.k) + run_tiles - 1) / run_tiles;
}

std::int64_t run_count(const Matrix &matrix) {
    return runs_down(matrix) * tiles_in(matrix.n);
}

// Calls work(run, thread) for each, `threads` at a time.
template <typename Work>
void for_each_run(const Matrix &matrix, int threads, Work work) {
    share(run_count(matrix), threads, [&](std::int64_t item, int thread) {
        const std::int64_t column = item / runs_down(matrix) * tile_extent;
        std::int64_t row = item % runs_down(matrix) * run_tiles * tile_extent;
        Run run{};
        for (; run.count < run_tiles && row < matrix.k; row += tile_extent) {
            run.windows[run.count++] = window_at(matrix, row, column);
        }
        work(run, thread);
    });
}

// How much of [from, from + tile_extent) lies before `end`.
int present(std::int64_t from, std::int64_t end) {
    return static_cast<int>(std::max<std::int64_t>(0, std::min<std::int64_t>(tile_extent, end - from)));
}

// Pairs of bytes to nibbles, the even column in the low one; whether all were 0..15.
bool join_bytes(const std::uint8_t *from, std::uint8_t *line) {
    std::uint16_t pairs[line_bytes];
    std::memcpy(pairs, from, sizeof pairs);
    std::uint16_t seen = 0;
    for (int i = 0; i < line_bytes; ++i) {
        seen |= pairs[i];
        line[i] = static_cast<std::uint8_t>(pairs[i] | pairs[i] >> 4);
    }
    return (seen & 0xf0f0) == 0;
}

// The row of the source that a tile's row is, or -1.
std::int64_t source_row(const Source &source, const Window &window, int row) {
    const std::int64_t at = window.row + row;
    if (source.rows == nullptr) {
        return at < source.k ? at : -1;
    }
    return row < window.rows ? source.rows[at] : -1;
}

constexpr int rows_ahead = 24;

// The tile's rows from a source of a byte a value; whether all were 0..15.
bool load_bytes(const Source &source, const Window &window, Tile &rows) {
    const int across = present(window.column, source.n);
    bool good = true;
    for (int row = 0; row < tile_extent; ++row) {
        auto *line = reinterpret_cast<std::uint8_t *>(rows.lines[row]);
        const std::int64_t from = source_row(source, window, row);
        // Rows are too far apart for the processor to see what comes next.
        const std::int64_t later = source_row(source, window, row + rows_ahead);
        if (later >= 0) {
            const std::uint8_t *const next = source.q + later * source.n + window.column;
            __builtin_prefetch(next);
            __builtin_prefetch(next + tile_extent / 2);
        }
        if (from < 0 || across == 0) {
            std::memset(line, fill_byte, line_bytes);
            continue;
        }
        const std::uint8_t *const found = source.q + from * source.n + window.column;
        if (across == tile_extent) {
            good &= join_bytes(found, line);
        } else {
            std::uint8_t padded[tile_extent];
            std::memset(padded, fill_nibble, sizeof padded);
            std::memcpy(padded, found, static_cast<std::size_t>(across));
            good &= join_bytes(padded, line);
        }
    }
    return good;
}

// The tile's rows from a source that lies along them, two values a byte.
void load_rows(const Source &source, const Window &window, Tile &rows) {
    const int bytes = present(window.column, source.n) / 2;
    for (int row = 0; row < tile_extent; ++row) {
        auto *line = reinterpret_cast<std::uint8_t *>(rows.lines[row]);
        const std::int64_t from = source_row(source, window, row);
        const bool there = from >= 0 && bytes > 0;
        if (!there || bytes < line_bytes) {
            std::memset(line, fill_byte, line_bytes);
        }
        if (there) {
            const std::uint8_t *const found = source.q + from * (source.n / 2) + window.column / 2;
            std::memcpy(line, found, static_cast<std::size_t>(bytes));
        }
    }
}

// The tile's columns, rows in their order, from a source that lies along them: 32-bit words of 8 rows.
void load_columns(const Source &source, std::int64_t first_row, std::int64_t first_column, Tile &columns) {
    const int rows = present(first_row, source.k) / 8 * 8;
    const int across = present(first_column, source.n);
    if (rows < tile_extent || across < tile_extent) {
        for (auto &line : columns.lines) {
            std::fill(std::begin(line), std::end(line), fill_word);
        }
    }
    if (rows == 0 || across == 0) {
        return;
    }
    if (source.format == Format::compressed_tensors) {
        const std::uint8_t *from = source.q + first_column * (source.k / 2) + first_row / 2;
        for (int column = 0; column < across; ++column, from += source.k / 2) {
            std::memcpy(columns.lines[column], from, static_cast<std::size_t>(rows / 2));
        }
        return;
    }
    const std::uint8_t *from = source.q + (first_row / 8 * source.n + first_column) * 4;
    for (int row = 0; row < rows; row += 8, from += source.n * 4) {
        std::uint32_t words[tile_extent];
        std::memcpy(words, from, static_cast<std::size_t>(across) * 4);
        for (int column = 0; column < across; ++column) {
            std::memcpy(reinterpret_cast<std::uint8_t *>(columns.lines[column]) + row / 2, &words[column], 4);
        }
    }
}

void store(const Matrix &matrix, const Window &window, const Tile &columns, bool interleaved, std::uint8_t *packed) {
    for_each_piece(matrix, window, interleaved, [&](std::int64_t offset, int column, int first, int bytes) {
        const auto *line = reinterpret_cast<const std::uint8_t *>(columns.lines[column]);
        std::memcpy(packed + offset, line + first, static_cast<std::size_t>(bytes));
    });
}

void load(const Matrix &matrix, const Window &window, const std::uint8_t *packed, bool interleaved, Tile &columns) {
    if (window.rows < tile_extent || window.columns < tile_extent) {
        std::memset(&columns, 0, sizeof columns);
    }
    for_each_piece(matrix, window, interleaved, [&](std::int64_t offset, int column, int first, int bytes) {
        auto *line = reinterpret_cast<std::uint8_t *>(columns.lines[column]);
        std::memcpy(line + first, packed + offset, static_cast<std::size_t>(bytes));
    });
}

// load(window, tile) for each tile of a run, then turn(tile) into packed columns.
template <typename Load, typename Turn>
void pack_runs(const Traits &traits, const Matrix &matrix, std::uint8_t *packed, int threads, Load load, Turn turn) {
    const int count = thread_count(threads, run_count(matrix));
    std::vector<Tile> buffers(static_cast<std::size_t>(count) * run_tiles);
    for_each_run(matrix, count, [&](const Run &run, int thread) {
        Tile *const tiles = &buffers[static_cast<std::size_t>(thread) * run_tiles];
        for (int i = 0; i < run.count; ++i) {
            load(run.windows[i], tiles[i]);
        }
        for (int i = 0; i < run.count; ++i) {
            turn(tiles[i]);
            store(matrix, run.windows[i], tiles[i], traits.interleaved, packed);
        }
    });
}

bool pack_rows(const Traits &traits, const Source &source, const Matrix &matrix, std::uint8_t *packed, int threads) {
    std::atomic<bool> good{true};
    const auto load = [&](const Window &window, Tile &tile) {
        if (source.format != Format::bytes) {
            load_rows(source, window, tile);
        } else if (!load_bytes(source, window, tile)) {
            good.store(false, std::memory_order_relaxed);
        }
    };
    const auto turn = [&](Tile &tile) {
        const Tile rows = tile;
        rows_to_columns(rows, tile, traits, source.format == Format::awq);
    };
    pack_runs(traits, matrix, packed, threads, load, turn);
    return good;
}

bool pack_columns(const Traits &traits, const Source &source, const Matrix &matrix, std::uint8_t *packed,
    int threads) {
    const auto load = [&](const Window &window, Tile &tile) {
        load_columns(source, window.row, window.column, tile);
    };
    const auto turn = [&](Tile &tile) {
        if (traits.permuted) {
            permute(tile);
        }
        if (traits.flip != 0) {
            for (auto &line : tile.lines) {
                for (Word &word : line) {
                    word ^= traits.flip;
                }
            }
        }
    };
    pack_runs(traits, matrix, packed, threads, load, turn);
    return true;
}

// Rows that are picked from columns: 128 columns at a time are turned into rows first, all the way down.
bool pack_gathered_columns(const Traits &traits, const Source &source, const Matrix &matrix, std::uint8_t *packed,
    int threads) {
    const std::int64_t strips = tiles_in(matrix.n);
    const std::int64_t tiles = tiles_in(source.k);
    const int count = thread_count(threads, strips);
    std::vector<Tile> buffers(static_cast<std::size_t>(count * tiles));
    share(strips, count, [&](std::int64_t strip, int thread) {
        Tile *const strip_rows = &buffers[static_cast<std::size_t>(thread * tiles)];
        const std::int64_t column = strip * tile_extent;
        Tile rows;
        Tile columns;
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            load_columns(source, tile * tile_extent, column, columns);
            columns_to_rows(columns, strip_rows[tile], natural);
        }
        for (std::int64_t row = 0; row < matrix.k; row += tile_extent) {
            const Window window = window_at(matrix, row, column);
            for (int i = 0; i < tile_extent; ++i) {
                const std::int64_t from = i < window.rows ? source.rows[row + i] : -1;
                if (from < 0) {
                    std::memset(rows.lines[i], fill_byte, line_bytes);
                } else {
                    std::memcpy(rows.lines[i], strip_rows[from / tile_extent].lines[from % tile_extent], line_bytes);
                }
            }
            rows_to_columns(rows, columns, traits, false);
            store(matrix, window, columns, traits.interleaved, packed);
        }
    });
    return true;
}

} // namespace

bool pack(Layout layout, const Source &source, std::int64_t k, std::int64_t n, std::uint8_t *packed, int threads) {
    const Traits traits = traits_of(layout);
    const Matrix matrix{k, n};
    const bool down_columns = source.format == Format::gptq || source.format == Format::compressed_tensors;
    const auto transform = !down_columns ? pack_rows : source.rows == nullptr ? pack_columns : pack_gathered_columns;
    return transform(traits, source, matrix, packed, threads);
}

void unpack(Layout layout, const std::uint8_t *packed, std::int64_t k, std::int64_t n, std::uint8_t *plain,
    int threads) {
    const Traits traits = traits_of(layout);
    const Matrix matrix{k, n};
    const int count = thread_count(threads, run_count(matrix));
    std::vector<Tile> buffers(static_cast<std::size_t>(count) * run_tiles);
    for_each_run(matrix, count, [&](const Run &run, int thread) {
        Tile *const tiles = &buffers[static_cast<std::size_t>(thread) * run_tiles];
        for (int i = 0; i < run.count; ++i) {
            load(matrix, run.windows[i], packed, traits.interleaved, tiles[i]);
        }
        for (int i = 0; i < run.count; ++i) {
            const Window &window = run.windows[i];
            Tile rows;
            columns_to_rows(tiles[i], rows, traits);
            for (int row = 0; row < window.rows; ++row) {
                std::memcpy(plain + (window.row + row) * (n / 2) + window.column / 2, rows.lines[row],
                    static_cast<std::size_t>(window.columns / 2));
            }
        }
    });
}

} // namespace w4a16::packing
