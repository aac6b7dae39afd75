// SPDX-License-Identifier: Apache-2.0
#pragma once

#include "tensorrt_llm/common/stringUtils.h"
#include "tensorrt_llm/common/tllmException.h"

class DebugConfig
{
public:
    static bool isCheckDebugEnabled();
};

namespace tensorrt_llm
{
namespace common
{
[[noreturn]] inline void throwRuntimeError(char const* file, int line, char const* info)
{
    throw TllmException(file, line, fmtstr("[TensorRT-LLM][ERROR] Assertion failed: %s", info).c_str());
}
} // namespace common
} // namespace tensorrt_llm

#define TLLM_CHECK_WITH_INFO(val, info, ...)                                                                           \
    do                                                                                                                 \
    {                                                                                                                  \
        if (!(val))                                                                                                    \
        {                                                                                                              \
            tensorrt_llm::common::throwRuntimeError(                                                                   \
                __FILE__, __LINE__, tensorrt_llm::common::fmtstr(info, ##__VA_ARGS__).c_str());                        \
        }                                                                                                              \
    } while (0)
#define TLLM_CHECK(val) TLLM_CHECK_WITH_INFO(val, "%s", #val)
#define TLLM_CHECK_DEBUG(val) TLLM_CHECK(!DebugConfig::isCheckDebugEnabled() || (val))
