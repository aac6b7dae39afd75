// SPDX-License-Identifier: Apache-2.0
// Lives apart from the other headers, as in the real library, so that its include path is needed too.
#pragma once

#include <cstdint>

namespace cutlass
{
// Rows of scales behind one another: how many there are for k inputs in groups.
constexpr int64_t packed_scale_rows(int k, int group_size)
{
    return (int64_t(k) + group_size - 1) / group_size;
}
} // namespace cutlass
