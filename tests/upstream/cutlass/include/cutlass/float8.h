// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/cutlass.h"

#include <cuda_fp8.h>

namespace cutlass
{
struct float_e4m3_t
{
    __nv_fp8_e4m3 storage;
    CUTLASS_HOST_DEVICE operator float() const
    {
        return static_cast<float>(storage);
    }
};
} // namespace cutlass
