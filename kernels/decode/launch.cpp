// Host side of the decode kernels: tensor maps and launch attributes.

#include "launch.h"

#include "driver.h"

#include <algorithm>
#include <atomic>
#include <climits>

namespace w4a16::decode {

namespace {

struct Tensor {
    CUtensorMapDataType type;
    const void *data;
    cuuint32_t rank;
    cuuint64_t extents[3];
    cuuint64_t strides[2]; // bytes, of all dimensions but the first
    cuuint32_t box[3];
    CUtensorMapSwizzle swizzle;
    CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
};

cudaError_t encode(CUtensorMap &map, const Tensor &tensor) {
    // The function appeared in CUDA 12.0.
    static const auto function = driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled", 12000);
    if (function == nullptr) {
        return cudaErrorInsufficientDriver;
    }
    const cuuint32_t steps[] = {1, 1, 1};
    const CUresult result = function(&map, tensor.type, tensor.rank, const_cast<void *>(tensor.data), tensor.extents,
        tensor.strides, tensor.box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, tensor.swizzle,
        tensor.promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// [N, K / 2] bytes; a box is a stage of a CTA's rows, swizzled by its width.
cudaError_t encode_weights(CUtensorMap &map, const Kernel &kernel, const Launch &launch) {
    const int width = kernel.stage_k / 2;
    const auto bytes = static_cast<cuuint64_t>(launch.k / 2);
    return encode(map,
        {CU_TENSOR_MAP_DATA_TYPE_UINT8, launch.b, 2, {bytes, static_cast<cuuint64_t>(launch.n), 0}, {bytes, 0},
            {static_cast<cuuint32_t>(width), static_cast<cuuint32_t>(kernel.rows), 0},
            width == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B});
}

// [M, K] halves as 64 x M x K / 64, so that one box brings a stage as tiles of 128 bytes a row.
cudaError_t encode_activations(CUtensorMap &map, const Kernel &kernel, const Launch &launch) {
    const int tokens = kernel.small_boxes ? std::min(launch.m, kernel.tokens) : kernel.tokens;
    return encode(map,
        {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, launch.a, 3,
            {64, static_cast<cuuint64_t>(launch.m), static_cast<cuuint64_t>(launch.k / 64)},
            {static_cast<cuuint64_t>(launch.k) * 2, 128},
            {64, static_cast<cuuint32_t>(tokens), static_cast<cuuint32_t>(kernel.stage_k / 64)},
            CU_TENSOR_MAP_SWIZZLE_128B});
}

// [K / group, N] halves; a box is what a stage of a CTA's rows needs.
cudaError_t encode_scales(CUtensorMap &map, const void *data, const Kernel &kernel, const Launch &launch) {
    const auto width = static_cast<cuuint64_t>(launch.n);
    const int groups = std::max(1, kernel.stage_k / launch.group_size);
    return encode(map,
        {CU_TENSOR_MAP_DATA_TYPE_FLOAT16, data, 2, {width, static_cast<cuuint64_t>(launch.k / launch.group_size), 0},
            {width * 2, 0}, {static_cast<cuuint32_t>(kernel.rows), static_cast<cuuint32_t>(groups), 0},
            CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B});
}

// Lets a kernel have all shared memory, once on each device.
cudaError_t prepare(const void *function, std::atomic<std::uint64_t> &prepared) {
    int device = 0;
    if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
        return error;
    }
    const std::uint64_t bit = device < 64 ? std::uint64_t{1} << device : 0; // others are prepared every time
    if ((prepared.load(std::memory_order_acquire) & bit) != 0) {
        return cudaSuccess;
    }
    const cudaError_t error
        = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes_of_a_cta(1));
    if (error == cudaSuccess) {
        prepared.fetch_or(bit, std::memory_order_release);
    }
    return error;
}

// log2 of a group size; of one that has none, which is K, so large that all of K is in the first group.
int shift_of(int group_size) {
    const auto size = static_cast<unsigned>(group_size);
    return (size & (size - 1)) == 0 ? __builtin_ctz(size) : 31;
}

// log2 of how many rows share the warps of a kernel that normalises them.
int rows_shift_of(int m) { return m <= 1 ? 0 : m <= 2 ? 1 : 2; }

int ceil_div(int value, int unit) { return value / unit + (value % unit != 0 ? 1 : 0); }

// Tells a launch's tickets from whatever else memory may hold: from those of other launches by a count, from anything
// else because the other bits are scattered.
std::uint64_t new_ticket() {
    static std::atomic<std::uint64_t> count{1};
    return count.fetch_add(1, std::memory_order_relaxed) * 0x9E3779B97F4A7C15ull; // odd: no two are the same
}

std::int64_t stages_of(const Kernel &kernel, int m, int n, int k) {
    return static_cast<std::int64_t>(ceil_div(n, kernel.rows)) * ceil_div(m, kernel.tokens) * ceil_div(k, kernel.stage_k);
}

// CTAs of a kernel that streams: as many as run at once, if there is a stage for each.
int streaming_ctas(const Kernel &kernel, int m, int n, int k, int sm_count) {
    const std::int64_t at_once = static_cast<std::int64_t>(sm_count) * kernel.streams;
    return static_cast<int>(std::min(stages_of(kernel, m, n, k), at_once));
}

Divisor divisor(int value) {
    int bits = 0; // so that value <= 2^bits
    while (std::int64_t{1} << bits < value) {
        ++bits;
    }
    if (value == 1) {
        return {1, 0, 0};
    }
    const std::uint64_t power = std::uint64_t{1} << (31 + bits);
    return {value, static_cast<std::uint32_t>((power + value - 1) / value), bits - 1};
}

// Whole tiles as long as there is one for each CTA, but for the last such round: the stages of that one and of the tiles
// that are left over are divided, so that no CTA has much less than a tile.
Streams streams_of(const Kernel &kernel, const Launch &launch, int ctas) {
    Streams made{};
    made.blocks_of_tile = divisor(ceil_div(launch.k, kernel.stage_k));
    made.token_tiles = divisor(ceil_div(launch.m, kernel.tokens));
    const int tiles = ceil_div(launch.n, kernel.rows) * made.token_tiles.value;
    made.whole = tiles % ctas == 0 ? tiles / ctas : std::max(tiles / ctas - 1, 0);
    made.streamed = tiles - made.whole * ctas;
    const int stages = made.streamed * made.blocks_of_tile.value;
    made.least = stages / ctas;
    made.more = stages % ctas;
    made.workspace = launch.workspace;
    made.ticket = new_ticket();
    return made;
}

Problem problem_of(const Launch &launch) {
    return {static_cast<const __half *>(launch.bias),
        {static_cast<__half *>(launch.c[0]), static_cast<__half *>(launch.c[1]), static_cast<__half *>(launch.c[2])},
        {launch.ends[0], launch.ends[1], launch.ends[2]}, launch.m, launch.n, launch.k, shift_of(launch.group_size),
        launch.dependence, {}};
}

} // namespace

bool streams_all(const Kernel &kernel, int m, int n, int k) { return stages_of(kernel, m, n, k) <= INT_MAX; }

std::size_t workspace_bytes(const Kernel &kernel, int m, int n, int k, int sm_count) {
    if (kernel.streams == 0) {
        return 0;
    }
    const auto ctas = static_cast<std::size_t>(streaming_ctas(kernel, m, n, k, sm_count));
    const std::size_t warps = kernel.rows / 16;
    const std::size_t sums = static_cast<std::size_t>(kernel.rows) * kernel.tokens;
    return ctas * (warps * sizeof(std::uint64_t) + sums * sizeof(float));
}

cudaError_t launch(const Kernel &kernel, const Launch &launch) {
    if (launch.shares > kernel.most_shares) {
        return cudaErrorInvalidConfiguration;
    }
    CUtensorMap weights;
    CUtensorMap activations;
    CUtensorMap scales;
    CUtensorMap zeros{};
    const void *const function = reinterpret_cast<const void *>(kernel.function);
    if (const cudaError_t error = prepare(function, *kernel.prepared); error != cudaSuccess) {
        return error;
    }
    if (const cudaError_t error = encode_weights(weights, kernel, launch); error != cudaSuccess) {
        return error;
    }
    if (const cudaError_t error = encode_activations(activations, kernel, launch); error != cudaSuccess) {
        return error;
    }
    if (const cudaError_t error = encode_scales(scales, launch.scales, kernel, launch); error != cudaSuccess) {
        return error;
    }
    if (launch.zeros != nullptr) {
        if (const cudaError_t error = encode_scales(zeros, launch.zeros, kernel, launch); error != cudaSuccess) {
            return error;
        }
    }
    Problem problem = problem_of(launch);
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t config = {};
    if (kernel.streams > 0) {
        const int ctas = streaming_ctas(kernel, launch.m, launch.n, launch.k, launch.sm_count);
        problem.streams = streams_of(kernel, launch, ctas);
        config.gridDim = dim3(ctas);
    } else {
        config.gridDim = dim3(ceil_div(launch.n, kernel.rows) * launch.shares, ceil_div(launch.m, kernel.tokens));
    }
    config.blockDim = dim3(kernel.threads);
    config.dynamicSmemBytes
        = launch.alone_on_sm ? std::max(kernel.shared_bytes, shared_bytes_of_a_cta(2) + 1) : kernel.shared_bytes;
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
    void *arguments[] = {&weights, &activations, &scales, &zeros, &problem};
    return cudaLaunchKernelExC(&config, function, arguments);
}

bool fits(const NormalizingKernel &kernel, int m, int k) {
    const int stage_k = kernel.shape.stage_k;
    return m <= 4 && static_cast<std::int64_t>(ceil_div(k, stage_k)) * stage_k << rows_shift_of(m) <= kernel.most_halves;
}

cudaError_t launch_normalizing(const NormalizingKernel &kernel, const Launch &launch, const Norm &given) {
    CUtensorMap weights;
    CUtensorMap scales;
    CUtensorMap zeros{};
    const void *const function = reinterpret_cast<const void *>(kernel.function);
    if (const cudaError_t error = prepare(function, *kernel.shape.prepared); error != cudaSuccess) {
        return error;
    }
    if (const cudaError_t error = encode_weights(weights, kernel.shape, launch); error != cudaSuccess) {
        return error;
    }
    if (const cudaError_t error = encode_scales(scales, launch.scales, kernel.shape, launch); error != cudaSuccess) {
        return error;
    }
    if (launch.zeros != nullptr) {
        if (const cudaError_t error = encode_scales(zeros, launch.zeros, kernel.shape, launch); error != cudaSuccess) {
            return error;
        }
    }
    Norm norm = given;
    norm.inverse = 1.0f / static_cast<float>(norm.hidden);
    norm.rows_shift = rows_shift_of(launch.m);
    const Problem problem = problem_of(launch);
    cudaLaunchAttribute serialization{};
    serialization.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    serialization.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(ceil_div(launch.n, kernel.shape.rows));
    config.blockDim = dim3(kernel.shape.threads);
    config.dynamicSmemBytes = kernel.shape.shared_bytes;
    config.stream = launch.stream;
    config.attrs = &serialization;
    config.numAttrs = launch.dependence != independent ? 1 : 0;
    void *arguments[] = {&weights, &scales, &zeros, const_cast<Problem *>(&problem), &norm};
    return cudaLaunchKernelExC(&config, function, arguments);
}

} // namespace w4a16::decode
