// SPDX-License-Identifier: Apache-2.0
// Empty types that name an epilogue in a template's arguments.
#pragma once

namespace tensorrt_llm
{
namespace cutlass_extensions
{
struct EpilogueOpBias
{
};

struct EpilogueOpDefault
{
};
} // namespace cutlass_extensions
} // namespace tensorrt_llm
