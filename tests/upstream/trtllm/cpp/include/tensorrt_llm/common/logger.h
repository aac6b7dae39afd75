// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensorrt_llm/common/assert.h"
#include "tensorrt_llm/common/stringUtils.h"

#include <iostream>

namespace tensorrt_llm
{
namespace common
{
class Logger
{
public:
    enum Level
    {
        TRACE = 0,
        DEBUG = 10,
        INFO = 20,
        WARNING = 30,
        ERROR = 40
    };

    static Logger* getLogger();

    bool isEnabled(Level level) const
    {
        return level_ <= level;
    }

    template <typename... Args>
    void log(Level level, char const* format, Args const&... args)
    {
        auto& out = level < WARNING ? std::cout : std::cerr;
        out << "[TensorRT-LLM] " << fmtstr(format, args...) << std::endl;
    }

private:
    Logger();

#ifdef NDEBUG
    Level level_ = INFO;
#else
    Level level_ = DEBUG;
#endif
};
} // namespace common
} // namespace tensorrt_llm

#define TLLM_LOG(level, ...)                                                                                           \
    do                                                                                                                 \
    {                                                                                                                  \
        auto* const logger = tensorrt_llm::common::Logger::getLogger();                                                \
        if (logger->isEnabled(level))                                                                                  \
        {                                                                                                              \
            logger->log(level, __VA_ARGS__);                                                                           \
        }                                                                                                              \
    } while (0)
#define TLLM_LOG_DEBUG(text) TLLM_LOG(tensorrt_llm::common::Logger::DEBUG, "%s", text)
#define TLLM_LOG_ERROR(text) TLLM_LOG(tensorrt_llm::common::Logger::ERROR, "%s", text)
