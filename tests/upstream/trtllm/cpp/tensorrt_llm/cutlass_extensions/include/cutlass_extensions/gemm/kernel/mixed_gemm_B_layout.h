// SPDX-License-Identifier: Apache-2.0
// Where a weight lies in a preprocessed matrix, for kernels that read one weight at a time.
#pragma once

#include "cutlass/detail/helper_macros.hpp"

#include <cstdint>

namespace cutlass
{
namespace gemm
{
namespace kernel
{
// A tile of rows is cut into pieces of 4 runs; `run` neighbouring rows stay together. Preprocessing puts run a of
// piece b where run b of piece a would be, so that a thread of a tensor-core fragment finds its weights side by side.
template <int WeightBits, int ActivationBits>
struct PackedLayout
{
    static constexpr int kRun = 32 / ActivationBits;
    static constexpr int kPieces = ActivationBits / WeightBits;
    static constexpr int kRowTile = 4 * kRun * kPieces;
    static constexpr int kPerWord = 32 / WeightBits;
    static constexpr int kTileK = 128 * 8 / ActivationBits;
    static constexpr int kZeroPoint = 1 << (WeightBits - 1);

    CUTLASS_HOST_DEVICE static constexpr int position_of_row(int row)
    {
        int const inside = row % kRowTile;
        int const run = inside / kRun % 4;
        int const piece = inside / (4 * kRun);
        return row - inside + (run * kPieces + piece) * kRun + inside % kRun;
    }

    // The stored, unsigned weight; `interleave` columns share tiles of kTileK rows (1 on Hopper).
    CUTLASS_HOST_DEVICE static int load(uint32_t const* words, int row, int column, int k, int interleave)
    {
        int const position = position_of_row(row);
        int64_t const element = int64_t(column / interleave) * interleave * k
            + int64_t(position / kTileK) * kTileK * interleave + column % interleave * kTileK + position % kTileK;
        int const inside = int(element % kPerWord);
        int const slot = inside % 2 * (kPerWord / 2) + inside / 2; // even ones in the low half, odd ones in the high
        return int(words[element / kPerWord] >> (slot * WeightBits) & ((1u << WeightBits) - 1));
    }
};
} // namespace kernel
} // namespace gemm
} // namespace cutlass
