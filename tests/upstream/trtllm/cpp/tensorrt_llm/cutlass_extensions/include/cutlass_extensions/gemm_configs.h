// SPDX-License-Identifier: Apache-2.0
// What a tactic is made of, as values at run time.
#pragma once

#include "cute/tensor.hpp"

namespace tensorrt_llm
{
namespace cutlass_extensions
{
enum class CutlassTileConfigSM90
{
    Undefined,
    ChooseWithHeuristic,
    CtaShape64x16x128B,
    CtaShape64x32x128B,
    CtaShape64x64x128B,
    CtaShape128x32x128B
};

enum class MainloopScheduleType
{
    AUTO
};

enum class EpilogueScheduleType
{
    AUTO
};

enum class ClusterShape
{
    ClusterShape_1x1x1,
    ClusterShape_2x1x1
};

struct CutlassGemmConfig
{
    enum CandidateConfigTypeParam : int
    {
        NONE = 0,
        WEIGHT_ONLY = 1u << 0,
        HOPPER = 1u << 3
    };

    CutlassTileConfigSM90 tile_config_sm90 = CutlassTileConfigSM90::ChooseWithHeuristic;
    MainloopScheduleType mainloop_schedule = MainloopScheduleType::AUTO;
    EpilogueScheduleType epilogue_schedule = EpilogueScheduleType::AUTO;
    ClusterShape cluster_shape = ClusterShape::ClusterShape_1x1x1;
    bool enableCudaKernel = false; // only says "use the GEMV"
    int sm_version = 80;
    bool is_tma_warp_specialized = false;

    CutlassGemmConfig() = default;

    CutlassGemmConfig(CutlassTileConfigSM90 tile, MainloopScheduleType mainloop, EpilogueScheduleType epilogue,
        ClusterShape cluster)
        : tile_config_sm90(tile)
        , mainloop_schedule(mainloop)
        , epilogue_schedule(epilogue)
        , cluster_shape(cluster)
        , sm_version(90)
        , is_tma_warp_specialized(true)
    {
    }
};
} // namespace cutlass_extensions
} // namespace tensorrt_llm
