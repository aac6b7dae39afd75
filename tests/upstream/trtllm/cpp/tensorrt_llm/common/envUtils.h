// SPDX-License-Identifier: Apache-2.0
#pragma once

namespace tensorrt_llm
{
namespace common
{
bool getBoolEnv(char const* name);
} // namespace common
} // namespace tensorrt_llm
