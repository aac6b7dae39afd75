// SPDX-License-Identifier: Apache-2.0
#include "tensorrt_llm/common/assert.h"
#include "tensorrt_llm/common/envUtils.h"

bool DebugConfig::isCheckDebugEnabled()
{
    static bool const enabled = tensorrt_llm::common::getBoolEnv("TLLM_DEBUG_MODE");
    return enabled;
}
