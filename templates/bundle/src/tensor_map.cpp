// Rendered from templates/bundle/src/tensor_map.cpp; do not edit.

// Older CUTLASS calls this driver function directly.  Linking libcuda would tie the library to machines that have a
// driver, so it is looked up when first called.  Where nothing calls it, the linker drops it.

#include <cuda.h>
#include <cuda_runtime_api.h>

namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
    void *function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    // The function appeared in CUDA 12.0.
    const cudaError_t error
        = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
    return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

} // namespace

extern "C" __attribute__((visibility("hidden"))) CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map,
    CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *extents, const cuuint64_t *strides,
    const cuuint32_t *box, const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    static const Encode encode = find_encode();
    if (encode == nullptr) {
        return CUDA_ERROR_NOT_FOUND;
    }
    return encode(map, type, rank, address, extents, strides, box, element_strides, interleave, swizzle, promotion,
        fill);
}
