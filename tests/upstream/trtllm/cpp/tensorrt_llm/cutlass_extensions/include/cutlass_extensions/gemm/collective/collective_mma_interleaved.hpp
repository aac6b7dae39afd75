// SPDX-License-Identifier: Apache-2.0
// One sum of products, with plain loads where the real one has TMA and tensor cores.
#pragma once

#include "cute/tensor.hpp"
#include "cutlass/cutlass.h"
#include "cutlass/gemm/dispatch_policy.hpp"
#include "cutlass/numeric_types.h"
#include "cutlass_extensions/gemm/kernel/mixed_gemm_B_layout.h"

namespace cutlass
{
namespace gemm
{
namespace collective
{
// The quant op is not an argument: zeros or none is told by the element tuple, one scale a column or a group by
// group_size at run time. Per-column and group-scale GEMMs therefore share one kernel, as upstream's do.
template <class DispatchPolicy, class TileShape_, class WeightInfo, class StrideWeight, class ElementAct, class StrideAct>
struct CollectiveMmaInterleaved;

template <class DispatchPolicy, class TileShape_, class ElementWeight, class ElementScale, class... ElementZero,
    class StrideWeight, class ElementAct, class StrideAct>
struct CollectiveMmaInterleaved<DispatchPolicy, TileShape_, cute::tuple<ElementWeight, ElementScale, ElementZero...>,
    StrideWeight, ElementAct, StrideAct>
{
    using TileShape = TileShape_;
    using ClusterShape = typename DispatchPolicy::ClusterShape;
    using Layout = kernel::PackedLayout<sizeof_bits<ElementWeight>::value, sizeof_bits<ElementAct>::value>;

    struct Params
    {
        ElementAct const* activations;  // [m, k]
        ElementWeight const* weights;   // [n, k], preprocessed
        ElementScale const* scales;     // [scale_rows, n]
        ElementScale const* zeros;      // the same, or null
        int group_size;
        int scale_rows;
    };

    CUTLASS_HOST_DEVICE static float dot(Params const& params, int m, int n, int columns, int k)
    {
        auto const* const words = reinterpret_cast<uint32_t const*>(params.weights);
        float sum = 0.f;
        for (int group = 0; group < params.scale_rows; ++group)
        {
            int64_t const at = int64_t(group) * columns + n;
            double const scale = float(params.scales[at]);
            double zero = 0.;
            if constexpr (sizeof...(ElementZero) > 0)
            {
                zero = float(params.zeros[at]);
            }
            int const last = (group + 1) * params.group_size < k ? (group + 1) * params.group_size : k;
            for (int row = group * params.group_size; row < last; ++row)
            {
                int const q = Layout::load(words, row, n, k, 1) - Layout::kZeroPoint;
                // Exact in double, so this rounds once: the same as a fused multiply-add in the scales' type.
                ElementScale const weight(q * scale + zero);
                sum += float(params.activations[int64_t(m) * k + row]) * float(weight);
            }
        }
        return sum;
    }
};
} // namespace collective
} // namespace gemm
} // namespace cutlass
