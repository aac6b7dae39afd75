// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/cutlass.h"

namespace cutlass
{
template <typename Operator>
CUTLASS_GLOBAL __launch_bounds__(Operator::MaxThreadsPerBlock, Operator::MinBlocksPerMultiprocessor) void device_kernel(
    CUTLASS_GRID_CONSTANT typename Operator::Params const params)
{
    extern __shared__ char smem[];
    Operator op;
    op(params, smem);
}
} // namespace cutlass
