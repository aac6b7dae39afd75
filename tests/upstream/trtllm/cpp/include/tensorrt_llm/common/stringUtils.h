// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdarg>
#include <string>

namespace tensorrt_llm
{
namespace common
{
inline std::string fmtstr(std::string const& text)
{
    return text;
}

// printf into a string; lives in stringUtils.cpp, so that file has to be linked.
std::string fmtstr(char const* format, ...) __attribute__((format(printf, 1, 2)));
} // namespace common
} // namespace tensorrt_llm
