// SPDX-License-Identifier: Apache-2.0
#include "tensorrt_llm/common/logger.h"
#include "tensorrt_llm/common/cudaUtils.h"

#include <cstdlib>
#include <string>

namespace tensorrt_llm
{
namespace common
{
Logger::Logger()
{
    char const* const name = std::getenv("TLLM_LOG_LEVEL");
    if (name != nullptr)
    {
        level_ = std::string(name) == "DEBUG" ? DEBUG : std::string(name) == "ERROR" ? ERROR : level_;
    }
}

Logger* Logger::getLogger()
{
    thread_local Logger instance;
    return &instance;
}
} // namespace common
} // namespace tensorrt_llm
