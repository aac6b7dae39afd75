// SPDX-License-Identifier: Apache-2.0
// Packs weights for the kernels: four steps, each one element at a time, for reading rather than for speed.
#include "tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.h"
#include "tensorrt_llm/common/assert.h"

#include <algorithm>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
namespace
{
struct Matrices
{
    size_t count, rows, columns;

    explicit Matrices(std::vector<size_t> const& shape)
    {
        TLLM_CHECK_WITH_INFO(shape.size() == 2 || shape.size() == 3, "Shape must be 2-D or 3-D");
        count = shape.size() == 2 ? 1 : shape[0];
        rows = shape[shape.size() - 2];
        columns = shape[shape.size() - 1];
    }
};

// Element `index` of a packed tensor; in 4-bit ones the even element is the low half of its byte.
int get(int8_t const* tensor, size_t index, int bits)
{
    size_t const bit = index * bits;
    return uint8_t(tensor[bit / 8]) >> bit % 8 & ((1 << bits) - 1);
}

void set(int8_t* tensor, size_t index, int bits, int value)
{
    size_t const bit = index * bits;
    int const mask = ((1 << bits) - 1) << bit % 8;
    tensor[bit / 8] = int8_t((uint8_t(tensor[bit / 8]) & ~mask) | (value << bit % 8 & mask));
}

std::vector<int> row_permutation(QuantType quant_type)
{
    bool const fp8 = quant_type == QuantType::W4_AFP8;
    int const run = fp8 ? 4 : 2;
    int const pieces = quant_type == QuantType::W4_A16 ? 4 : 2;
    std::vector<int> rows;
    for (int i = 0; i < 4; ++i)
    {
        for (int piece = 0; piece < pieces; ++piece)
        {
            for (int j = 0; j < run; ++j)
            {
                rows.push_back((piece * 4 + i) * run + j);
            }
        }
    }
    return rows;
}

// In column-major matrices: the first tile of `columns` neighbouring columns, then their second one, and so on.
void interleave_columns(
    int8_t* out, int8_t const* in, Matrices const& shape, int bits, size_t tile_rows, size_t columns)
{
    for (size_t i = 0; i < shape.count * shape.rows * shape.columns; ++i)
    {
        size_t const row = i % shape.rows;
        size_t const column = i / shape.rows;
        size_t const to = (column / columns * shape.rows + row / tile_rows * tile_rows) * columns
            + column % columns * tile_rows + row % tile_rows;
        set(out, to, bits, get(in, i, bits));
    }
}
} // namespace

void permute_B_rows_for_mixed_gemm(
    int8_t* out, int8_t const* in, std::vector<size_t> const& shape_, QuantType quant_type, int64_t const)
{
    Matrices const shape(shape_);
    std::vector<int> const permutation = row_permutation(quant_type);
    size_t const tile = permutation.size();
    TLLM_CHECK_WITH_INFO(shape.rows % tile == 0, "Number of rows must be a multiple of %zu", tile);
    TLLM_CHECK_WITH_INFO(shape.columns % 8 == 0, "Number of columns must be a multiple of 8");
    size_t const row_bytes = shape.columns * get_weight_quant_bits(quant_type) / 8;
    for (size_t row = 0; row < shape.count * shape.rows; ++row)
    {
        size_t const from = row / tile * tile + permutation[row % tile];
        std::copy_n(in + from * row_bytes, row_bytes, out + row * row_bytes);
    }
}

void subbyte_transpose(int8_t* out, int8_t const* in, std::vector<size_t> const& shape_, QuantType quant_type)
{
    Matrices const shape(shape_);
    int const bits = get_weight_quant_bits(quant_type);
    size_t const vector_bytes = 32;
    TLLM_CHECK_WITH_INFO(
        shape.rows * bits / 8 % vector_bytes == 0 && shape.columns * bits / 8 % vector_bytes == 0,
        "Number of bytes for rows and cols must be a multiple of %zu", vector_bytes);
    size_t const size = shape.rows * shape.columns;
    for (size_t i = 0; i < shape.count * size; ++i)
    {
        size_t const inside = i % size;
        size_t const to = i - inside + inside % shape.columns * shape.rows + inside / shape.columns;
        set(out, to, bits, get(in, i, bits));
    }
}

void add_bias_and_interleave_quantized_tensor_inplace(int8_t* tensor, size_t const num_elts, QuantType quant_type)
{
    int const bits = get_weight_quant_bits(quant_type);
    size_t const word = 32 / bits;
    int const bias = 1 << (bits - 1);
    TLLM_CHECK(num_elts % word == 0);
    for (size_t base = 0; base < num_elts; base += word)
    {
        int values[8];
        for (size_t i = 0; i < word; ++i)
        {
            values[i] = get(tensor, base + i, bits) ^ bias; // the same as adding it to a signed value
        }
        for (size_t i = 0; i < word; ++i)
        {
            set(tensor, base + i, bits, values[i < word / 2 ? 2 * i : 2 * i - word + 1]);
        }
    }
}

void preprocess_weights_for_mixed_gemm(
    int8_t* out, int8_t const* in, std::vector<size_t> const& shape_, QuantType quant_type, bool force_interleave)
{
    int arch = tensorrt_llm::common::getSMVersion();
    if ((force_interleave && arch >= 90) || arch >= 120)
    {
        arch = 80;
    }
    TLLM_CHECK_WITH_INFO(arch >= 75, "Unsupported Arch");
    Matrices const shape(shape_);
    int const bits = get_weight_quant_bits(quant_type);
    size_t const elements = shape.count * shape.rows * shape.columns;
    std::vector<int8_t> from(in, in + elements * bits / 8);
    std::vector<int8_t> to(from.size());

    permute_B_rows_for_mixed_gemm(to.data(), from.data(), shape_, quant_type, arch);
    from.swap(to);
    subbyte_transpose(to.data(), from.data(), shape_, quant_type);
    from.swap(to);
    if (arch < 90 || arch >= 100) // Hopper's kernels take whole columns
    {
        size_t const tile_rows = quant_type == QuantType::W4_AFP8 ? 128 : 64;
        size_t const columns = 128 * 8 / (tile_rows * bits);
        TLLM_CHECK_WITH_INFO(shape.rows % tile_rows == 0, "Number of rows must be a multiple of %zu", tile_rows);
        interleave_columns(to.data(), from.data(), shape, bits, tile_rows, columns);
        from.swap(to);
    }
    add_bias_and_interleave_quantized_tensor_inplace(from.data(), elements, quant_type);
    std::copy(from.begin(), from.end(), out);
}

} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
