// Rendered from templates/bundle/src/activations_api.cpp; do not edit.

// The part of the C API that rearranges activations.

#include "activations/gather_columns.h"
#include "extents.h"
#include "launch.h"

w4a16_status w4a16_gather_columns(const void *x, int64_t m, int64_t x_stride, int64_t k_in, const int32_t *columns,
    int64_t k_out, void *out, void *stream) {
    using namespace w4a16;
    const struct {
        const char *name;
        std::int64_t extent;
        std::int64_t least;
    } extents[] = {{"m", m, 0}, {"k_in", k_in, 1}, {"x_stride", x_stride, k_in}, {"k_out", k_out, 1}};
    for (const auto &item : extents) {
        if (const w4a16_status status = check_extent(item.name, item.extent, item.least); status != W4A16_OK) {
            return status;
        }
    }
    if (k_out % 8 != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "k_out is %lld, expected a multiple of 8",
            static_cast<long long>(k_out));
    }
    if (m == 0) {
        return W4A16_OK;
    }
    const std::int64_t x_bytes = ((m - 1) * x_stride + k_in) * 2;
    if (const w4a16_status status = check_buffers(x, "x", x_bytes, out, "out", m * k_out * 2); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointer(x, "x", 2); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointer(out, "out", 16); status != W4A16_OK) {
        return status;
    }
    if (columns != nullptr) {
        if (const w4a16_status status = check_pointer(columns, "columns", 4); status != W4A16_OK) {
            return status;
        }
    }
    int sm_count = 0;
    if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
        return status;
    }
    activations::Gather gather{};
    gather.x = static_cast<const std::uint16_t *>(x);
    gather.m = static_cast<int>(m);
    gather.x_stride = x_stride;
    gather.k_in = static_cast<int>(k_in);
    gather.columns = columns;
    gather.k_out = static_cast<int>(k_out);
    gather.out = static_cast<std::uint16_t *>(out);
    return launched([&] { activations::gather_columns(gather, sm_count, static_cast<CUstream_st *>(stream)); });
}
