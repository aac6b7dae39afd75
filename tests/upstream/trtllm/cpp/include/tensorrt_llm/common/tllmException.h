// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <stdexcept>

namespace tensorrt_llm
{
namespace common
{
class TllmException : public std::runtime_error
{
public:
    explicit TllmException(char const* file, std::size_t line, char const* message);
    ~TllmException() noexcept override;
};
} // namespace common
} // namespace tensorrt_llm
