// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace cutlass
{
namespace gemm
{
struct KernelTmaWarpSpecializedPingpong
{
};

struct KernelTmaWarpSpecializedCooperative
{
};

template <int Stages_, class ClusterShape_, class KernelSchedule_>
struct MainloopSm90TmaGmmaRmemAWarpSpecializedMixedInput
{
    using ClusterShape = ClusterShape_;
    using Schedule = KernelSchedule_;
};
} // namespace gemm
} // namespace cutlass
