// Rendered from templates/bundle/src/gptq_api.cpp; do not edit.

// The part of the C API that multiplies with GPTQ's own layout.

#include "extents.h"
#include "fusion/gptq_plain.h"
#include "launch.h"

#include <iterator>

namespace w4a16 {
namespace {

constexpr std::int64_t depth_unit = 32;

w4a16_status prepare(const w4a16_gptq_args *args, fusion::GptqProduct &product) {
    if (const w4a16_status status = check_input(args, "args"); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_flags(args->flags); status != W4A16_OK) {
        return status;
    }
    if (args->reserved != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "args->reserved is %d, expected 0", static_cast<int>(args->reserved));
    }
    if (args->zero_offset != 0 && args->zero_offset != 1) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "zero_offset is %d, expected 0 or 1",
            static_cast<int>(args->zero_offset));
    }
    int segments = 0;
    if (const w4a16_status status = count_segments(args->n, "n", segments); status != W4A16_OK) {
        return status;
    }
    // Blocks of rows are the grid's second dimension.
    constexpr std::int64_t most_rows = 65535 * 8;
    if (const w4a16_status status = check_extent("m", args->m, 0, most_rows); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_extent("k", args->k, depth_unit); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_multiple("k", args->k, depth_unit); status != W4A16_OK) {
        return status;
    }
    const std::int64_t group_size = args->group_size == 0 ? args->k : args->group_size;
    if (const w4a16_status status = check_extent("group_size", group_size, depth_unit, args->k); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_multiple("group_size", group_size, depth_unit); status != W4A16_OK) {
        return status;
    }
    product.a = static_cast<const std::uint16_t *>(args->a);
    product.m = static_cast<int>(args->m);
    product.k = static_cast<int>(args->k);
    product.group_size = static_cast<int>(group_size);
    product.qweight = static_cast<const std::uint32_t *>(args->qweight);
    product.qzeros = static_cast<const std::uint32_t *>(args->qzeros);
    product.zero_offset = static_cast<std::uint32_t>(args->zero_offset);
    product.scales = static_cast<const std::uint16_t *>(args->scales);
    product.g_idx = args->g_idx;
    product.bias = static_cast<const std::uint16_t *>(args->bias);
    for (int i = 0; i < most_segments; ++i) {
        product.n += static_cast<int>(args->n[i]);
        product.c[i] = static_cast<std::uint16_t *>(args->c[i]);
        product.ends[i] = product.n;
    }
    product.overlap = (args->flags & W4A16_RUN_OVERLAP) != 0;
    constexpr int most_groups = 65536; // numbers of 16 bits
    if (product.g_idx != nullptr
        && (product.groups() > most_groups || fusion::gptq_plain_memory(product) > fusion::gptq_plain_most_memory)) {
        return fail(W4A16_ERROR_UNSUPPORTED,
            "k is %lld and group_size is %lld: with g_idx, scales and zeros of %d groups do not fit into shared memory",
            static_cast<long long>(args->k), static_cast<long long>(group_size), product.groups());
    }
    return W4A16_OK;
}

w4a16_status check_pointers(const w4a16_gptq_args &args) {
    const struct {
        const void *pointer;
        const char *name;
        std::uintptr_t alignment;
        bool optional;
    } pointers[] = {
        {args.a, "a", 16, false},
        {args.qweight, "qweight", 16, false},
        {args.qzeros, "qzeros", 4, true},
        {args.scales, "scales", 16, false},
        {args.g_idx, "g_idx", 4, true},
        {args.bias, "bias", 2, true},
    };
    for (const auto &item : pointers) {
        if (item.pointer == nullptr && item.optional) {
            continue;
        }
        if (const w4a16_status status = check_pointer(item.pointer, item.name, item.alignment); status != W4A16_OK) {
            return status;
        }
    }
    constexpr const char *names[] = {"c[0]", "c[1]", "c[2]"};
    static_assert(std::size(names) == most_segments, "each segment has a name");
    for (int i = 0; i < most_segments; ++i) {
        if (args.n[i] > 0) {
            if (const w4a16_status status = check_pointer(args.c[i], names[i], 2); status != W4A16_OK) {
                return status;
            }
        }
    }
    return W4A16_OK;
}

} // namespace
} // namespace w4a16

w4a16_status w4a16_gptq_supports(const w4a16_gptq_args *args) {
    w4a16::fusion::GptqProduct product{};
    return w4a16::prepare(args, product);
}

w4a16_status w4a16_gptq_linear(const w4a16_gptq_args *args, void *stream) {
    using namespace w4a16;
    fusion::GptqProduct product{};
    if (const w4a16_status status = prepare(args, product); status != W4A16_OK) {
        return status;
    }
    if (product.m == 0) {
        return W4A16_OK;
    }
    if (const w4a16_status status = check_pointers(*args); status != W4A16_OK) {
        return status;
    }
    int sm_count = 0;
    if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
        return status;
    }
    return launched([&] { fusion::gptq_plain(product, static_cast<CUstream_st *>(stream)); });
}
