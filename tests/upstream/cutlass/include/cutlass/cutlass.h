// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "cutlass/detail/helper_macros.hpp"
#include "cutlass/version.h"

#include <cstddef>
#include <cstdint>

namespace cutlass
{
enum class Status
{
    kSuccess,
    kErrorMisalignedOperand,
    kErrorWorkspaceNull,
    kErrorInternal
};

inline char const* cutlassGetStatusString(Status status)
{
    switch (status)
    {
    case Status::kSuccess: return "Success";
    case Status::kErrorMisalignedOperand: return "Error Misaligned Operand";
    case Status::kErrorWorkspaceNull: return "Error Workspace Null";
    default: return "Error Internal";
    }
}

constexpr int ceil_div(int a, int b)
{
    return (a + b - 1) / b;
}
} // namespace cutlass
