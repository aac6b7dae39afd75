// Rendered from templates/bundle/src/launch.h; do not edit.

// What every entry point that launches does around its kernels.

#pragma once

#include "device.h"
#include "status.h"

#include <cuda_runtime_api.h>

namespace w4a16 {

inline w4a16_status check_pointer(const void *pointer, const char *name, std::uintptr_t alignment) {
    if (pointer == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is NULL", name);
    }
    if (reinterpret_cast<std::uintptr_t>(pointer) % alignment != 0) {
        return fail(W4A16_ERROR_MISALIGNED, "%s (%p) is not aligned to %d bytes", name, pointer,
            static_cast<int>(alignment));
    }
    return W4A16_OK;
}

inline w4a16_status check_flags(std::uint32_t flags) {
    if ((flags & ~W4A16_RUN_OVERLAP) != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "flags is %u, expected 0 or W4A16_RUN_OVERLAP",
            static_cast<unsigned>(flags));
    }
    return W4A16_OK;
}

// Runs `work`, which launches on the current device, and reports what CUDA says of it.
template <typename Work>
w4a16_status launched(Work work) {
    // An error that somebody else left would look like one of this launch.
    if (const cudaError_t error = cudaPeekAtLastError(); error != cudaSuccess) {
        return fail(W4A16_ERROR_CUDA, "nothing was launched: an earlier CUDA call failed with %s: %s",
            cudaGetErrorName(error), cudaGetErrorString(error));
    }
    const w4a16_status status = guarded([&] {
        work();
        return W4A16_OK;
    });
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
        return fail(W4A16_ERROR_CUDA, "%s: %s", cudaGetErrorName(error), cudaGetErrorString(error));
    }
    return status;
}

} // namespace w4a16
