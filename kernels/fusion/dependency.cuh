// Programmatic dependent launch: what a kernel tells its successor, and what it awaits of its predecessor.

#pragma once

#include <cstddef>
#include <utility>

#include <cuda_runtime.h>

namespace w4a16::fusion {

// From here on the next kernel may be launched, if it asked for that; it still has to wait for this one's results.
inline __device__ void release_dependents() {
    asm volatile("griddepcontrol.launch_dependents;");
}

// Returns when everything before this kernel has ended and can be seen; at once if the launch was an ordinary one.
inline __device__ void await_prerequisites() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Brings a line into the L2.  It may come before the wait: what is in the L2 is what memory has.
inline __device__ void prefetch(const void *address) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Launches; with `overlap` before the stream's last kernel has ended.  The caller asks CUDA for the error.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, unsigned int threads, std::size_t shared_bytes, bool overlap,
    CUstream_st *stream, Arguments &&...arguments) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = overlap ? 1 : 0;
    static_cast<void>(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...));
}

} // namespace w4a16::fusion
