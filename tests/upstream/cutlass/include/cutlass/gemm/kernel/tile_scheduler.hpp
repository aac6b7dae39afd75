// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace cutlass
{
namespace gemm
{
struct PersistentScheduler
{
    static constexpr bool kNeedsWorkspace = false;
};

// The real one keeps partial tiles and barriers in the workspace; this one only asks for and clears the barriers.
struct StreamKScheduler
{
    static constexpr bool kNeedsWorkspace = true;
};
} // namespace gemm
} // namespace cutlass
