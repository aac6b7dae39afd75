// SPDX-License-Identifier: Apache-2.0
#include "envUtils.h"

#include <cstdlib>

namespace tensorrt_llm
{
namespace common
{
bool getBoolEnv(char const* name)
{
    char const* const value = std::getenv(name);
    return value != nullptr && value[0] == '1' && value[1] == '\0';
}
} // namespace common
} // namespace tensorrt_llm
