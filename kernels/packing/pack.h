// Weight packing: 4-bit matrices, plain or as checkpoints store them, into the layouts that TensorRT-LLM's mixed-input
// kernels read.

#pragma once

#include <cstdint>

namespace w4a16::packing {

// What a packed weight looks like.  All layouts walk down the columns of the [K, N] matrix, 32 rows to 16 bytes.
enum class Layout {
    // SM90: each column contiguous; the rows of each 32 permuted so that a thread's operand registers hold what WGMMA
    // wants, the nibbles of each 32-bit word ordered for conversion two at a time.
    column_permuted,
    // SM90 before the permuted layout existed (TensorRT-LLM up to 0.15): contiguous columns in natural order, signed.
    column_signed,
    // SM75 to SM89, SM100 and later: as column_permuted, with blocks of 64 rows of 4 columns interleaved.
    interleaved,
};

// How the unsigned nibbles of a [K, N] matrix lie before they are packed; the numbers are those of w4a16_source.
enum class Format {
    plain = 0,              // [K, N / 2] bytes, the even column in the low nibble
    gptq = 1,               // [K / 8, N] words: nibble i of word [r, c] is row 8 r + i
    awq = 2,                // [K, N / 8] words: nibble i of word [r, c] is column 8 c + awq_column(i)
    compressed_tensors = 3, // [N, K / 8] words: nibble i of word [c, r] is row 8 r + i
    bytes = 4,              // [K, N] bytes of 0..15
};

// Even columns come first, as in the packed layouts: AWQ's kernels convert two nibbles at a time as well.
constexpr int awq_column(int nibble) {
    return nibble < 4 ? 2 * nibble : 2 * nibble - 7;
}

// Which of 32 rows stands at nibble 0..31 of their 16 bytes.  Permuted: 32-bit word w of the four holds rows 2w and
// 2w + 1 of each 8, the pairs that one thread feeds to an MMA.  All even rows come first, so that masking a register
// gives two values a half2 apart.
constexpr int row_at(bool permuted, int nibble) {
    return permuted ? 2 * (nibble / 8) + nibble % 8 / 4 + 8 * (nibble % 4) : nibble;
}

// What a packed weight holds where the source has no row or column: the weight 0, if there are no zeros.
constexpr int fill_nibble = 8;

// A matrix of source_bytes().  K is a multiple of 8 in gptq and compressed_tensors, N of 8 in awq and of 2 in plain.
struct Source {
    Format format;
    std::int64_t k;
    std::int64_t n;
    const std::uint8_t *q;
    // For each row of the packed weight its row in the source, or -1 for none; null: row i is row i.
    const std::int32_t *rows;
};

constexpr std::int64_t source_bytes(const Source &source) {
    return source.format == Format::bytes ? source.k * source.n : source.k * source.n / 2;
}

// All functions want K of the packed weight to be a multiple of 64, N of 8, buffers that do not overlap, and a source
// that is no larger than the packed weight; what is larger is filled.  `threads` = 0 takes one per core; if not all of
// them can be started, the others do their work.  std::bad_alloc is all that they throw, before anything is written.

// `source.rows` are in -1..source.k - 1.  Whether all values are 0..15; what is packed is of no use if not, which only
// Format::bytes can hold.
[[nodiscard]] bool pack(Layout layout, const Source &source, std::int64_t k, std::int64_t n, std::uint8_t *packed,
    int threads);

// To Format::plain.
void unpack(Layout layout, const std::uint8_t *packed, std::int64_t k, std::int64_t n, std::uint8_t *plain,
    int threads);

} // namespace w4a16::packing
