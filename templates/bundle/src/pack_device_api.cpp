// Rendered from templates/bundle/src/pack_device_api.cpp; do not edit.

// The packing part of the C API that runs on the GPU.

#include "launch.h"
#include "pack_check.h"
#include "packing/pack_device.h"

namespace w4a16 {
namespace {

// The tiles of a larger weight might be more than a grid has blocks.
w4a16_status check_size(std::int64_t k, std::int64_t n) {
    constexpr std::int64_t most_bytes = std::int64_t{1} << 40;
    if (k / 2 * n > most_bytes) {
        return fail(W4A16_ERROR_UNSUPPORTED, "K is %lld and N is %lld: a weight of more than 1 TiB fits on no GPU",
            static_cast<long long>(k), static_cast<long long>(n));
    }
    return W4A16_OK;
}

} // namespace
} // namespace w4a16

w4a16_status w4a16_pack_weight_device(const w4a16_pack_args *args, void *stream) {
    using namespace w4a16;
    packing::Layout layout{};
    packing::Source source{};
    if (const w4a16_status status = check_pack_args(args, layout, source); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_size(args->k, args->n); status != W4A16_OK) {
        return status;
    }
    const bool bytes = source.format == packing::Format::plain || source.format == packing::Format::bytes;
    const std::uintptr_t word = bytes ? 1 : 4;
    if (const w4a16_status status = check_pointer(source.q, "q", word); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointer(args->out, "out", 16); status != W4A16_OK) {
        return status;
    }
    if (source.rows != nullptr) {
        if (const w4a16_status status = check_pointer(source.rows, "rows", 4); status != W4A16_OK) {
            return status;
        }
    }
    int sm_count = 0;
    if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
        return status;
    }
    return launched([&] {
        packing::pack_device(layout, source, args->k, args->n, static_cast<std::uint8_t *>(args->out),
            static_cast<CUstream_st *>(stream));
    });
}

w4a16_status w4a16_unpack_device(const char *arch, const void *packed, int64_t k, int64_t n, void *q, void *stream) {
    using namespace w4a16;
    packing::Layout layout{};
    if (const w4a16_status status = check_packed(arch, k, n, layout); status != W4A16_OK) {
        return status;
    }
    const std::int64_t bytes = k / 2 * n;
    if (const w4a16_status status = check_buffers(packed, "packed", bytes, q, "q", bytes); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_size(k, n); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointer(packed, "packed", 16); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointer(q, "q", 4); status != W4A16_OK) {
        return status;
    }
    int sm_count = 0;
    if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
        return status;
    }
    return launched([&] {
        packing::unpack_device(layout, static_cast<const std::uint8_t *>(packed), k, n, static_cast<std::uint8_t *>(q),
            static_cast<CUstream_st *>(stream));
    });
}
