// SPDX-License-Identifier: Apache-2.0
#include "tensorrt_llm/common/stringUtils.h"
#include "tensorrt_llm/common/assert.h"

#include <cstdio>

namespace tensorrt_llm
{
namespace common
{
std::string fmtstr(char const* format, ...)
{
    va_list args;
    va_start(args, format);
    va_list again;
    va_copy(again, args);
    int const size = std::vsnprintf(nullptr, 0, format, args);
    va_end(args);
    std::string text(size > 0 ? size : 0, '\0');
    std::vsnprintf(text.data(), text.size() + 1, format, again);
    va_end(again);
    TLLM_CHECK(size >= 0);
    return text;
}
} // namespace common
} // namespace tensorrt_llm
