// SPDX-License-Identifier: Apache-2.0
#include "tensorrt_llm/common/tllmException.h"
#include "tensorrt_llm/common/stringUtils.h"

namespace tensorrt_llm
{
namespace common
{
TllmException::TllmException(char const* file, std::size_t line, char const* message)
    : std::runtime_error{fmtstr("%s (%s:%zu)", message, file, line)}
{
}

TllmException::~TllmException() noexcept = default;
} // namespace common
} // namespace tensorrt_llm
