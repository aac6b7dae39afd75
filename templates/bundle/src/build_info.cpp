// Rendered from templates/bundle/src/build_info.cpp; do not edit.

// Version and build information.

#include "config.h"
#include "status.h"
#include "tactics.h"

#include <cuda_runtime_api.h>

// Set by CMake: what the sources cannot know about themselves.
#ifndef W4A16_BUNDLE_DIGEST
#define W4A16_BUNDLE_DIGEST "unknown"
#endif
#ifndef W4A16_COMPILER
#define W4A16_COMPILER "unknown"
#endif
#ifndef W4A16_COMPRESS
#define W4A16_COMPRESS "unknown"
#endif

uint32_t w4a16_api_version(void) {
    return W4A16_API_VERSION;
}

const char *w4a16_version(void) {
    return w4a16::config::version;
}

w4a16_status w4a16_build_info(w4a16_build *info) {
    using namespace w4a16;
    if (const w4a16_status status = check_output(info, "info"); status != W4A16_OK) {
        return status;
    }
    w4a16_build build{};
    build.api_version = W4A16_API_VERSION;
    build.version = config::version;
    build.profile = config::profile;
    build.architecture = config::architecture;
    build.release = config::release;
    build.trtllm_commit = config::trtllm_commit;
    build.cutlass_commit = config::cutlass_commit;
    build.bundle_digest = W4A16_BUNDLE_DIGEST;
    build.compiler = W4A16_COMPILER;
    build.compress = W4A16_COMPRESS;
    build.cuda_runtime_version = CUDART_VERSION;
    build.tactic_count = tactic_count();
    build.gemv_reason = config::gemv_reason;
    fill_output(info, build);
    return W4A16_OK;
}
