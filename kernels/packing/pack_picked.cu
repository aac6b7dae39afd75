// Packs rows in any order from a source that lies along columns (GPTQ and compressed-tensors with act-order).
//
// A block of threads takes a strip of 8 columns, all the way down: it turns the strip into rows in shared memory, 8
// nibbles a word, and picks rows from there.  So the source is read once and in order, whatever the order of rows is.
//
// Never let this kernel trigger programmatic launch completion: see pack_device.cu.

#include "pack_parameters.cuh"

namespace w4a16::packing {

constexpr int strip_columns = 8;
constexpr int strip_threads = 256;
constexpr int strip_most_rows = 57344; // 224 KiB of shared memory, of 227 that a block may have
constexpr int default_shared_bytes = 48 << 10;

static_assert(strip_columns == 8 * static_cast<int>(sizeof(Word)) / 4, "a row of a strip is one word");
static_assert(strip_most_rows * static_cast<int>(sizeof(Word)) <= 227 << 10, "a strip fits into shared memory");

// 8 rows of the strip, a column each.  `aligned`: words of GPTQ can be read four at a time.
template <Format format, bool aligned>
__device__ void load_strip(const PackParameters &p, int first_column, int eight_rows, Word (&words)[strip_columns]) {
    const Word *const q = reinterpret_cast<const Word *>(p.q);
    if constexpr (format == Format::gptq && aligned) {
#pragma unroll
        for (int i = 0; i < strip_columns; i += 4) {
            const int column = first_column + i;
            const std::int64_t at = std::int64_t{eight_rows} * p.source_n + column;
            const uint4 found = column < p.source_n ? __ldg(reinterpret_cast<const uint4 *>(q + at))
                                                    : make_uint4(fill_word, fill_word, fill_word, fill_word);
            words[i] = found.x;
            words[i + 1] = found.y;
            words[i + 2] = found.z;
            words[i + 3] = found.w;
        }
    } else {
#pragma unroll
        for (int i = 0; i < strip_columns; ++i) {
            const int column = first_column + i;
            const std::int64_t at = format == Format::gptq
                ? std::int64_t{eight_rows} * p.source_n + column
                : std::int64_t{column} * (p.source_k / 8) + eight_rows;
            words[i] = column < p.source_n ? __ldg(q + at) : fill_word;
        }
    }
}

template <Format format, bool aligned>
__global__ void __launch_bounds__(strip_threads) pack_picked_kernel(const PackParameters p) {
    static_assert(format == Format::gptq || format == Format::compressed_tensors, "words of 8 rows of a column");
    extern __shared__ uint4 strip[];
    Word *const rows = reinterpret_cast<Word *>(strip);
    const int first_column = static_cast<int>(blockIdx.x) * strip_columns;
    for (int eight = threadIdx.x; eight < p.source_k / 8; eight += strip_threads) {
        Word words[8];
        load_strip<format, aligned>(p, first_column, eight, words);
        transpose(words);
        strip[2 * eight] = make_uint4(words[0], words[1], words[2], words[3]);
        strip[2 * eight + 1] = make_uint4(words[4], words[5], words[6], words[7]);
    }
    __syncthreads();
    Word *const out = reinterpret_cast<Word *>(p.out);
    // Four threads share a block of 32 rows, a word each.
    for (int item = threadIdx.x; item < p.packed.k_blocks * 4; item += strip_threads) {
        const int block = item / 4;
        const int part = item % 4;
        Word words[8];
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            const int row = __ldg(p.rows + block * block_rows + row_at(p.packed.permuted, part * 8 + i));
            words[i] = row >= 0 && row < p.source_k ? rows[row] : fill_word;
        }
        transpose(words);
#pragma unroll
        for (int i = 0; i < strip_columns; ++i) {
            out[p.packed.block_at(first_column + i, block) * 4 + part] = words[i] ^ p.packed.flip;
        }
    }
}

template <Format format, bool aligned>
void launch_picked(const PackParameters &parameters, CUstream_st *stream) {
    const int bytes = parameters.source_k * static_cast<int>(sizeof(Word));
    const auto kernel = pack_picked_kernel<format, aligned>;
    if (bytes > default_shared_bytes) {
        // What fails here fails at the launch, too, where the caller asks for the error.  Always the most that is ever
        // asked for: another thread's smaller launch must not lower the limit of this one.
        constexpr int most = strip_most_rows * static_cast<int>(sizeof(Word));
        (void)cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    }
    const auto strips = static_cast<unsigned int>(parameters.packed.n / strip_columns);
    kernel<<<strips, strip_threads, static_cast<std::size_t>(bytes), stream>>>(parameters);
}

bool pack_picked_device(const PackParameters &parameters, Format format, CUstream_st *stream) {
    if (parameters.source_k > strip_most_rows) {
        return false;
    }
    if (format == Format::compressed_tensors) {
        launch_picked<Format::compressed_tensors, true>(parameters, stream);
    } else if (reinterpret_cast<std::uintptr_t>(parameters.q) % sizeof(uint4) == 0 && parameters.source_n % 4 == 0) {
        launch_picked<Format::gptq, true>(parameters, stream);
    } else {
        launch_picked<Format::gptq, false>(parameters, stream);
    }
    return true;
}

} // namespace w4a16::packing
