// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace cutlass
{
namespace arch
{
struct Sm90
{
    static constexpr int kMinComputeCapability = 90;
};
} // namespace arch
} // namespace cutlass
