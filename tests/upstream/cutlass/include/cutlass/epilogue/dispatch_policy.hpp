// SPDX-License-Identifier: Apache-2.0
// Tags of the epilogue's schedules; here they change nothing but a kernel's name.
#pragma once

namespace cutlass
{
namespace epilogue
{
struct TmaWarpSpecialized
{
};

struct TmaWarpSpecializedCooperative
{
};
} // namespace epilogue
} // namespace cutlass
