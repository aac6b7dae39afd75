// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/dispatch_policy.hpp"
#include "cutlass/epilogue/dispatch_policy.hpp"

namespace cutlass
{
namespace epilogue
{
namespace collective
{
// out = alpha * sum + bias; a null bias counts as zero.
template <class Schedule, class TileShape, class ElementBias, class ElementOutput>
struct CollectiveEpilogue
{
    struct Params
    {
        float alpha;
        ElementBias const* bias;
        ElementOutput* out;
    };

    CUTLASS_HOST_DEVICE static void store(Params const& params, float sum, int m, int n, int columns)
    {
        float const bias = params.bias == nullptr ? 0.f : float(params.bias[n]);
        params.out[int64_t(m) * columns + n] = ElementOutput(double(params.alpha * sum + bias));
    }
};
} // namespace collective
} // namespace epilogue
} // namespace cutlass
