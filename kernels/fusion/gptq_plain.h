// The product with a weight as GPTQ checkpoints hold it: nothing is packed.

#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace w4a16::fusion {

constexpr int most_segments = 3;

// Shared memory that a thread block may have, less what the kernel takes by itself.
constexpr int gptq_plain_most_memory = 216 * 1024;

// c[i, j] = sum over k of a[i, k] * (q[k, j] - zero[g, j]) * scale[g, j], + bias[j], with g = g_idx[k], or k / group_size.
struct GptqProduct {
    const std::uint16_t *a; // [m, k] half, dense, aligned to 16 bytes
    int m;                  // > 0
    int n;                  // a multiple of 8
    int k;                  // a multiple of 32
    int group_size;         // a multiple of 32; k for one scale a column
    const std::uint32_t *qweight; // [k / 8, n], aligned to 16 bytes: nibble i of word [r, j] is row 8 r + i
    const std::uint32_t *qzeros;  // [groups, n / 8]: nibble i of word [g, c] is column 8 c + i; null: all 8
    std::uint32_t zero_offset;    // added to every nibble of qzeros, modulo 2**32 for the word: 1 for v1, 0 for v2
    const std::uint16_t *scales;  // [groups, n] half, aligned to 8 bytes
    const std::int32_t *g_idx;    // [k]; null: rows are in the order of their groups
    const std::uint16_t *bias;    // [n] half, or null
    // Columns go to c[0] until it has ends[0] of them, then to c[1] until ends[1], and so on.
    std::uint16_t *c[most_segments]; // [m, its columns] half, dense
    int ends[most_segments];         // ascending, the last one n
    // May start before the stream's last kernel has ended; `a` is read after it has, all else may be before.
    bool overlap;

    int groups() const { return (k + group_size - 1) / group_size; }
};

// Bytes of shared memory that the launch takes: more than gptq_plain_most_memory, and it fails.
std::size_t gptq_plain_memory(const GptqProduct &product);

// Launches one kernel on the current device; the caller asks CUDA for the error.
void gptq_plain(const GptqProduct &product, CUstream_st *stream);

} // namespace w4a16::fusion
