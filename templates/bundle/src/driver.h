// Rendered from templates/bundle/src/driver.h; do not edit.

// Functions of the driver, looked up when they are first needed: linking libcuda would tie the library to machines that
// have a driver.

#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace w4a16 {

// `name` as of CUDA `version` (1000 * major + 10 * minor); null where the driver lacks it.
template <typename Function>
Function driver_function(const char *name, unsigned int version) {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    const cudaError_t error = cudaGetDriverEntryPointByVersion(name, &function, version, cudaEnableDefault, &found);
    const bool there = error == cudaSuccess && found == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<Function>(function) : nullptr;
}

} // namespace w4a16
