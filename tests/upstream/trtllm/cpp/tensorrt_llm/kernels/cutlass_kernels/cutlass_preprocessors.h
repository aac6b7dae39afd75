// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensorrt_llm/common/cudaUtils.h"

#include <cstddef>
#include <cstdint>
#include <vector>

namespace tensorrt_llm
{
namespace kernels
{
namespace cutlass_kernels
{
enum class QuantType
{
    W8_A16,
    W4_A16,
    W4_AFP8
};

constexpr int get_weight_quant_bits(QuantType quant_type)
{
    return quant_type == QuantType::W8_A16 ? 8 : 4;
}

// Shapes are [rows, columns] or [experts, rows, columns].
void permute_B_rows_for_mixed_gemm(int8_t* permuted_quantized_tensor, int8_t const* quantized_tensor,
    std::vector<size_t> const& shape, QuantType quant_type, int64_t const arch_version);

void subbyte_transpose(int8_t* transposed_quantized_tensor, int8_t const* quantized_tensor,
    std::vector<size_t> const& shape, QuantType quant_type);

void add_bias_and_interleave_quantized_tensor_inplace(int8_t* tensor, size_t const num_elts, QuantType quant_type);

void preprocess_weights_for_mixed_gemm(int8_t* preprocessed_quantized_weight, int8_t const* row_major_quantized_weight,
    std::vector<size_t> const& shape, QuantType quant_type, bool force_interleave = false);
} // namespace cutlass_kernels
} // namespace kernels
} // namespace tensorrt_llm
