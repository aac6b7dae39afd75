// Host side of the decode kernels.

#include "launch.h"

namespace w4a16::decode {

namespace {

using Encode = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *, const cuuint64_t *,
    const cuuint64_t *, const cuuint32_t *, const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
    CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// libcuda's function, found at run time so that the library loads on machines without a driver.
Encode encoder() {
    static const Encode function = [] {
        void *pointer = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &pointer, 12000, cudaEnableDefault, &found);
        return error == cudaSuccess && found == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(pointer)
                                                                             : nullptr;
    }();
    return function;
}

} // namespace

cudaError_t weight_map(CUtensorMap *map, const void *data, int width, int height, int box_width, int box_height) {
    const Encode encode = encoder();
    if (encode == nullptr) {
        return cudaErrorInsufficientDriver;
    }
    const cuuint64_t extents[] = {static_cast<cuuint64_t>(width), static_cast<cuuint64_t>(height)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(width)};
    const cuuint32_t box[] = {static_cast<cuuint32_t>(box_width), static_cast<cuuint32_t>(box_height)};
    const cuuint32_t steps[] = {1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<void *>(data), extents, strides,
        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
        box_width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t activation_map(CUtensorMap *map, const void *data, int m, int k, int tokens, int tiles) {
    const Encode encode = encoder();
    if (encode == nullptr) {
        return cudaErrorInsufficientDriver;
    }
    const cuuint64_t extents[] = {64, static_cast<cuuint64_t>(m), static_cast<cuuint64_t>(k / 64)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(k) * 2, 128};
    const cuuint32_t box[] = {64, static_cast<cuuint32_t>(tokens), static_cast<cuuint32_t>(tiles)};
    const cuuint32_t steps[] = {1, 1, 1};
    const CUresult result = encode(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 3, const_cast<void *>(data), extents, strides,
        box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

cudaError_t launch_kernel(const void *kernel, int ctas, int threads, int shared_bytes, const CUtensorMap &weights,
    const CUtensorMap &activations, const Launch &launch) {
    if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
        error != cudaSuccess) {
        return error;
    }
    int shift = 31; // per column
    for (int s = 5; s <= 8; ++s) { // groups of 32 to 256
        if (launch.group_size == 1 << s) {
            shift = s;
        }
    }
    if (shift == 31 && launch.group_size != launch.k) {
        return cudaErrorInvalidValue; // no kernel is built for this group
    }
    Problem problem{static_cast<const __half *>(launch.scales), static_cast<const __half *>(launch.zeros),
        static_cast<const __half *>(launch.bias), static_cast<__half *>(launch.c), launch.m, launch.n, launch.k, shift,
        launch.dependence};
    cudaLaunchAttribute attributes[2];
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(ctas);
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = launch.stream;
    config.attrs = attributes;
    if (launch.shares > 1) {
        cudaLaunchAttribute &cluster = attributes[config.numAttrs++];
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim.x = launch.shares;
        cluster.val.clusterDim.y = 1;
        cluster.val.clusterDim.z = 1;
    }
    if (launch.dependence != independent) {
        cudaLaunchAttribute &serialization = attributes[config.numAttrs++];
        serialization.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        serialization.val.programmaticStreamSerializationAllowed = 1;
    }
    void *arguments[] = {const_cast<CUtensorMap *>(&weights), const_cast<CUtensorMap *>(&activations), &problem};
    return cudaLaunchKernelExC(&config, kernel, arguments);
}

} // namespace w4a16::decode
