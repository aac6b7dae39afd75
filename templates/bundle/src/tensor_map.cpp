// Rendered from templates/bundle/src/tensor_map.cpp; do not edit.

// Older CUTLASS calls this driver function directly; where nothing calls it, the linker drops it.

#include "driver.h"

extern "C" __attribute__((visibility("hidden"))) CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap *map,
    CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *extents, const cuuint64_t *strides,
    const cuuint32_t *box, const cuuint32_t *element_strides, CUtensorMapInterleave interleave,
    CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
    // The function appeared in CUDA 12.0.
    static const auto encode = w4a16::driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
    if (encode == nullptr) {
        return CUDA_ERROR_NOT_FOUND;
    }
    return encode(map, type, rank, address, extents, strides, box, element_strides, interleave, swizzle, promotion,
        fill);
}
