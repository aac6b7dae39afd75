// Products with GPTQ's own layout, for few rows of activations: 32 columns a thread block, all of K, no second pass.
//
// Eight lanes read 128 bytes of a row of words, 4 columns each; the 32 groups of lanes split K, and are summed in a
// fixed order at the end.  Weights become exact half integers q - zero, two at a time; four products are summed as halves,
// then scaled and summed in FP32.  So that those four cannot overflow, activations are staged times a power of two.

#include "gptq_plain.h"

#include "dependency.cuh"

#include <algorithm>
#include <cstring>

#include <cuda_fp16.h>
#include <cuda_pipeline.h>

namespace w4a16::fusion {

constexpr int threads = 256;
constexpr int warp_size = 32;
constexpr int warps = threads / warp_size;
constexpr int thread_columns = 4; // of one 16-byte load
constexpr int lanes = 8;
constexpr int tile_columns = lanes * thread_columns;
constexpr int slots = threads / lanes;
constexpr int word_rows = 8; // of K in a word of 32 bits

// Activations that a thread block stages at a time: of all its rows, and in any order, where groups and a table need
// room as well, of each.
constexpr int staged_halves = 32768;
constexpr int any_order_halves = 16384;
constexpr int any_order_row_halves = 4096;

struct Arguments {
    GptqProduct product;
    int groups;
    int batches;         // of words a thread reads at a time, in all of K
    int chunk_batches;   // that are staged at a time, a multiple of `slots` unless it is all of them
    int batches_a_group; // if rows are in the order of their groups
};

inline __device__ __half2 as_half2(unsigned int bits) {
    __half2 value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline __device__ __half as_half(unsigned int bits) {
    return __ushort_as_half(static_cast<unsigned short>(bits));
}

// (q - zero) of the eight rows of a word, as pairs of rows i and i + 4.
struct Weights {
    __half2 pairs[4];
};

// 0x6400 is 1024 in half, whose unit is 1, and 0x5400 is 64, whose unit is 1/16: a nibble in the mantissa's low bits
// adds itself, exactly.
inline __device__ Weights dequantized(unsigned int word, unsigned int zero) {
    constexpr unsigned int low_nibbles = 0x000f000f;
    constexpr unsigned int high_nibbles = 0x00f000f0;
    constexpr unsigned int base = 0x64006400;
    const __half2 low_zero = as_half2((0xe400u | zero) * 0x00010001u);       // -(1024 + zero)
    const __half2 high_zero = as_half2((0xd400u | zero << 4) * 0x00010001u); // -(64 + zero)
    const __half2 sixteenth = as_half2(0x2c002c00u);
    const unsigned int upper = word >> 8;
    Weights w;
    w.pairs[0] = __hadd2(as_half2((word & low_nibbles) | base), low_zero);
    w.pairs[1] = __hfma2(as_half2((word & high_nibbles) | base), sixteenth, high_zero);
    w.pairs[2] = __hadd2(as_half2((upper & low_nibbles) | base), low_zero);
    w.pairs[3] = __hfma2(as_half2((upper & high_nibbles) | base), sixteenth, high_zero);
    return w;
}

inline __device__ unsigned int component(const uint4 &vector, int i) {
    return i == 0 ? vector.x : i == 1 ? vector.y : i == 2 ? vector.z : vector.w;
}

// Eight halves in the order 0 4 1 5 2 6 3 7, in which weights come.
inline __device__ uint4 paired(const uint4 &a) {
    return make_uint4(__byte_perm(a.x, a.z, 0x5410), __byte_perm(a.x, a.z, 0x7632), __byte_perm(a.y, a.w, 0x5410),
        __byte_perm(a.y, a.w, 0x7632));
}

// What activations are multiplied with when they are staged, by the bits of the largest magnitude: then it is below 512,
// and 4 products with up to 16 are below 32768.  1 where it is in a comfortable range, or not finite.
inline __device__ int scaling_of(unsigned int largest) {
    const int exponent = static_cast<int>(largest >> 10);
    constexpr int comfortable = 8; // 2**-7
    constexpr int highest = 23;    // 256 to 512
    if (exponent >= 31 || largest == 0 || (exponent >= comfortable && exponent <= highest)) {
        return 0;
    }
    return min(highest - max(exponent, 1), 15);
}

inline __device__ float power_of_two(int exponent) {
    return __int_as_float((127 + exponent) << 23);
}

// Adds what eight rows of K contribute to four columns, all of one group.  `activations(row)` are eight in pairs.
template <int rows, typename Activations>
inline __device__ void add(const uint4 &four, const uint2 &scales, unsigned int zeros, Activations activations,
    float (&sum)[rows][thread_columns]) {
    // Registers for the sums of many rows leave room for fewer columns at a time.
    constexpr int together = rows > 4 ? 2 : thread_columns;
#pragma unroll
    for (int first = 0; first < thread_columns; first += together) {
        Weights w[together];
        float scale[together];
#pragma unroll
        for (int i = 0; i < together; ++i) {
            w[i] = dequantized(component(four, first + i), zeros >> 4 * (first + i) & 15);
            scale[i] = __half2float(as_half((first + i < 2 ? scales.x : scales.y) >> 16 * (i % 2)));
        }
#pragma unroll
        for (int row = 0; row < rows; ++row) {
            const uint4 a = activations(row);
#pragma unroll
            for (int i = 0; i < together; ++i) {
                __half2 products = __hmul2(as_half2(a.x), w[i].pairs[0]);
                products = __hfma2(as_half2(a.y), w[i].pairs[1], products);
                products = __hfma2(as_half2(a.z), w[i].pairs[2], products);
                products = __hfma2(as_half2(a.w), w[i].pairs[3], products);
                float &to = sum[row][first + i];
                to = fmaf(__low2float(products) + __high2float(products), scale[i], to);
            }
        }
    }
}

// The same where each row has a group of its own; `groups` are eight numbers of 16 bits, and `table` the thread's columns
// of what a group stands for.
template <int rows, typename Activations>
inline __device__ void add_in_any_order(const uint4 &four, const uint4 &groups, const uint4 *table,
    Activations activations, float (&sum)[rows][thread_columns]) {
    uint4 a[rows];
#pragma unroll
    for (int row = 0; row < rows; ++row) {
        a[row] = activations(row);
    }
#pragma unroll
    for (int i = 0; i < word_rows; ++i) {
        const unsigned int group = component(groups, i / 2) >> 16 * (i % 2) & 0xffff;
        const uint4 entries = table[group * lanes];
        float w[thread_columns];
#pragma unroll
        for (int j = 0; j < thread_columns; ++j) {
            const unsigned int entry = component(entries, j);
            const __half q = as_half((component(four, j) >> 4 * i & 15) | 0x6400);
            w[j] = __half2float(__hsub(q, as_half(entry >> 16))) * __half2float(as_half(entry));
        }
#pragma unroll
        for (int row = 0; row < rows; ++row) {
            const float x = __half2float(as_half(component(a[row], i % 4) >> 16 * (i / 4)));
#pragma unroll
            for (int j = 0; j < thread_columns; ++j) {
                sum[row][j] = fmaf(x, w[j], sum[row][j]);
            }
        }
    }
}

// `rows` of activations a thread block; `words` of a column a batch, of one group; `any_order`: rows of K come in any
// order of groups.
template <int rows, int words, bool any_order>
__global__ void __launch_bounds__(threads, 2) gptq_plain_kernel(const Arguments given) {
    static_assert(rows * tile_columns <= threads, "a thread finishes at most one output");
    // Activations of a batch, and a vector that keeps the batches of a warp's four groups of lanes in different banks.
    constexpr int pitch = words + 1;
    const GptqProduct &p = given.product;
    release_dependents();

    extern __shared__ uint4 memory[];
    __shared__ unsigned int largest[rows][warps];
    __shared__ int scaling[2][rows]; // of the chunk at hand and the one before it
    __shared__ float sums[warps][rows][tile_columns];
    uint4 *const activations = memory; // [rows][chunk_batches * pitch]
    const int row_pitch = given.chunk_batches * pitch;
    // In any order: the group of each row of K as 16 bits, like activations; scales and zeros [groups][tile_columns].
    uint4 *const staged_groups = memory + rows * row_pitch;
    uint4 *const table = staged_groups + row_pitch;

    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % lanes;
    const int slot = thread / lanes;
    const int column = static_cast<int>(blockIdx.x) * tile_columns + lane * thread_columns;
    const bool has_columns = column < p.n;
    const int first_row = static_cast<int>(blockIdx.y) * rows;

    const auto scales_of = [&](int group) {
        return __ldg(reinterpret_cast<const uint2 *>(p.scales + static_cast<std::int64_t>(group) * p.n + column));
    };
    // The zeros of the thread's columns, in the low 16 bits.
    const auto zeros_of = [&](int group) {
        if (p.qzeros == nullptr) {
            return 0x8888u;
        }
        const std::int64_t word = static_cast<std::int64_t>(group) * (p.n / 8) + column / 8;
        return (__ldg(p.qzeros + word) + p.zero_offset * 0x11111111u) >> column % 8 * 4;
    };

    // What the thread reads of a batch, ahead of its turn.
    struct Batch {
        uint4 words_of[words];
        uint2 scales;
        unsigned int zeros;
    };
    const auto read = [&](int batch) {
        Batch found{};
        if (has_columns && batch < given.batches) {
#pragma unroll
            for (int i = 0; i < words; ++i) {
                const std::int64_t word_row = static_cast<std::int64_t>(batch) * words + i;
                found.words_of[i] = __ldg(reinterpret_cast<const uint4 *>(p.qweight + word_row * p.n + column));
            }
            if constexpr (!any_order) {
                const int group = batch / given.batches_a_group;
                found.scales = scales_of(group);
                found.zeros = zeros_of(group);
            }
        }
        return found;
    };
    Batch next = read(slot);
    if constexpr (any_order) {
        // Of each group and column the scale and 1024 + zero, as halves.
        for (int i = thread; i < given.groups * lanes; i += threads) {
            uint4 entries = make_uint4(0, 0, 0, 0);
            if (has_columns) { // i % lanes is the thread's own lane
                const uint2 scales = scales_of(i / lanes);
                const unsigned int zeros = zeros_of(i / lanes);
                entries = make_uint4((scales.x & 0xffff) | (0x6400u | (zeros & 15)) << 16,
                    scales.x >> 16 | (0x6400u | (zeros >> 4 & 15)) << 16,
                    (scales.y & 0xffff) | (0x6400u | (zeros >> 8 & 15)) << 16,
                    scales.y >> 16 | (0x6400u | (zeros >> 12 & 15)) << 16);
            }
            table[i] = entries;
        }
    }
    await_prerequisites();

    // Stages K from `first_batch` on, times a power of two for each row.
    const auto stage = [&](int first_batch, int count, int turn) {
        const int vectors = count * words;
        const int first_vector = first_batch * words;
        const auto place = [&](int vector) { return vector / words * pitch + vector % words; };
        // All loads first, past the registers; each thread then goes on with the vectors that it fetched.
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            const bool inside = first_row + row < p.m;
            const uint4 *const from
                = reinterpret_cast<const uint4 *>(p.a + static_cast<std::int64_t>(first_row + row) * p.k) + first_vector;
            for (int vector = thread; vector < vectors; vector += threads) {
                uint4 *const to = activations + row * row_pitch + place(vector);
                if (inside) {
                    __pipeline_memcpy_async(to, from + vector, sizeof *to);
                } else {
                    *to = make_uint4(0, 0, 0, 0);
                }
            }
        }
        __pipeline_commit();
        __pipeline_wait_prior(0);
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            unsigned int most = 0;
            for (int vector = thread; vector < vectors; vector += threads) {
                uint4 &a = activations[row * row_pitch + place(vector)];
                constexpr unsigned int magnitude = 0x7fff7fff;
                most = __vmaxu2(most, __vmaxu2(__vmaxu2(a.x & magnitude, a.y & magnitude),
                                          __vmaxu2(a.z & magnitude, a.w & magnitude)));
                a = paired(a);
            }
            most = __reduce_max_sync(0xffffffff, max(most & 0xffff, most >> 16));
            if (thread % warp_size == 0) {
                largest[row][thread / warp_size] = most;
            }
        }
        if constexpr (any_order) {
            for (int vector = thread; vector < vectors; vector += threads) {
                const int *const groups = p.g_idx + (first_vector + vector) * word_rows;
                unsigned int of[word_rows];
#pragma unroll
                for (int i = 0; i < word_rows; ++i) {
                    of[i] = min(static_cast<unsigned int>(__ldg(groups + i)), static_cast<unsigned int>(given.groups - 1));
                }
                staged_groups[place(vector)]
                    = make_uint4(of[0] | of[1] << 16, of[2] | of[3] << 16, of[4] | of[5] << 16, of[6] | of[7] << 16);
            }
        }
        __syncthreads();
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            unsigned int most = 0;
#pragma unroll
            for (int warp = 0; warp < warps; ++warp) {
                most = max(most, largest[row][warp]);
            }
            const int exponent = scaling_of(most);
            if (thread == 0) {
                scaling[turn][row] = exponent;
            }
            if (exponent == 0) {
                continue;
            }
            const __half2 factor = as_half2(static_cast<unsigned int>(15 + exponent) * 0x04000400u);
            for (int vector = thread; vector < vectors; vector += threads) {
                uint4 &a = activations[row * row_pitch + place(vector)];
                __half2 pairs[4];
                memcpy(pairs, &a, sizeof pairs);
#pragma unroll
                for (__half2 &pair : pairs) {
                    pair = __hmul2(pair, factor);
                }
                memcpy(&a, pairs, sizeof pairs);
            }
        }
        __syncthreads();
    };

    float sum[rows][thread_columns] = {};
    int batch = slot;
    int turn = 1;
#pragma unroll 1
    for (int chunk = 0; chunk < given.batches; chunk += given.chunk_batches) {
        const int count = min(given.chunk_batches, given.batches - chunk);
        turn = 1 - turn;
        __syncthreads(); // the chunk before is no longer read
        stage(chunk, count, turn);
        if (chunk > 0) {
            // From the last chunk's unit to this one's.
#pragma unroll
            for (int row = 0; row < rows; ++row) {
                const float factor = power_of_two(scaling[turn][row] - scaling[1 - turn][row]);
#pragma unroll
                for (float &value : sum[row]) {
                    value *= factor;
                }
            }
        }
#pragma unroll 1
        for (; batch < chunk + count; batch += slots) {
            const Batch current = next;
            // The sums of 8 rows leave no registers for two batches.
            constexpr bool ahead = rows < 8;
            if constexpr (ahead) {
                next = read(batch + slots);
            }
            const int here = (batch - chunk) * pitch;
#pragma unroll
            for (int i = 0; i < words; ++i) {
                const uint4 &four = current.words_of[i];
                if constexpr (any_order) {
                    add_in_any_order(four, staged_groups[here + i], table + lane,
                        [&](int row) { return activations[row * row_pitch + here + i]; }, sum);
                } else {
                    add(four, current.scales, current.zeros,
                        [&](int row) { return activations[row * row_pitch + here + i]; }, sum);
                }
            }
            if constexpr (!ahead) {
                next = read(batch + slots);
            }
        }
    }

    // Over the warp's four groups of lanes, then over warps, always in the same order.
#pragma unroll
    for (int row = 0; row < rows; ++row) {
#pragma unroll
        for (float &value : sum[row]) {
            value += __shfl_xor_sync(0xffffffff, value, lanes);
            value += __shfl_xor_sync(0xffffffff, value, 2 * lanes);
        }
        if (thread % warp_size < lanes) {
#pragma unroll
            for (int i = 0; i < thread_columns; ++i) {
                sums[thread / warp_size][row][lane * thread_columns + i] = sum[row][i];
            }
        }
    }
    __syncthreads();
    const int row = thread / tile_columns;
    const int output = static_cast<int>(blockIdx.x) * tile_columns + thread % tile_columns;
    if (row >= rows || first_row + row >= p.m || output >= p.n) {
        return;
    }
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < warps; ++warp) {
        total += sums[warp][row][thread % tile_columns];
    }
    total *= power_of_two(-scaling[turn][row]);
    if (p.bias != nullptr) {
        total += __half2float(as_half(__ldg(p.bias + output)));
    }
    int begin = 0;
#pragma unroll
    for (int segment = 0; segment < most_segments; ++segment) {
        const int end = p.ends[segment];
        if (output >= begin && output < end) {
            p.c[segment][static_cast<std::int64_t>(first_row + row) * (end - begin) + output - begin]
                = __half_as_ushort(__float2half_rn(total));
        }
        begin = end;
    }
}

using Kernel = void (*)(Arguments);

struct Variant {
    Kernel kernel;
    int rows;
    int words;
};

// Few words a batch where groups are small, and where sums take the registers.
Variant variant_of(const GptqProduct &p) {
    if (p.g_idx != nullptr) {
        return p.m == 1 ? Variant{gptq_plain_kernel<1, 4, true>, 1, 4}
            : p.m <= 4  ? Variant{gptq_plain_kernel<4, 4, true>, 4, 4}
                        : Variant{gptq_plain_kernel<8, 4, true>, 8, 4};
    }
    if (p.m > 4) {
        return {gptq_plain_kernel<8, 4, false>, 8, 4};
    }
    if (p.m > 2) {
        return {gptq_plain_kernel<4, 4, false>, 4, 4};
    }
    const bool long_batches = p.k % 64 == 0 && p.group_size % 64 == 0;
    if (p.m == 1) {
        return long_batches ? Variant{gptq_plain_kernel<1, 8, false>, 1, 8}
                            : Variant{gptq_plain_kernel<1, 4, false>, 1, 4};
    }
    return long_batches ? Variant{gptq_plain_kernel<2, 8, false>, 2, 8} : Variant{gptq_plain_kernel<2, 4, false>, 2, 4};
}

Arguments arguments_of(const GptqProduct &p, const Variant &variant) {
    Arguments arguments{};
    arguments.product = p;
    arguments.groups = p.groups();
    arguments.batches = p.k / (variant.words * word_rows);
    const int most = p.g_idx == nullptr ? staged_halves / variant.rows
                                        : std::min(any_order_halves / variant.rows, any_order_row_halves);
    arguments.chunk_batches = std::min(most / (variant.words * word_rows), arguments.batches);
    arguments.batches_a_group = p.group_size / (variant.words * word_rows);
    return arguments;
}

std::size_t shared_bytes(const Arguments &arguments, const Variant &variant) {
    const bool any_order = arguments.product.g_idx != nullptr;
    const std::size_t staged = static_cast<std::size_t>(arguments.chunk_batches) * (variant.words + 1);
    const std::size_t table = any_order ? static_cast<std::size_t>(arguments.groups) * lanes : 0;
    return (staged * (variant.rows + (any_order ? 1 : 0)) + table) * sizeof(uint4);
}

std::size_t gptq_plain_memory(const GptqProduct &product) {
    const Variant variant = variant_of(product);
    return shared_bytes(arguments_of(product, variant), variant);
}

void gptq_plain(const GptqProduct &product, CUstream_st *stream) {
    const Variant variant = variant_of(product);
    const Arguments arguments = arguments_of(product, variant);
    const std::size_t bytes = shared_bytes(arguments, variant);
    // Always the same value: threads that launch at the same time set no limit that is too low for another.
    if (cudaFuncSetAttribute(variant.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, gptq_plain_most_memory)
        != cudaSuccess) {
        return;
    }
    const dim3 grid(static_cast<unsigned int>((product.n + tile_columns - 1) / tile_columns),
        static_cast<unsigned int>((product.m + variant.rows - 1) / variant.rows));
    launch(variant.kernel, grid, threads, bytes, product.overlap, stream, arguments);
}

} // namespace w4a16::fusion
