// Rendered from templates/bundle/src/pack_api.cpp; do not edit.

// The packing part of the C API; it uses no CUDA, so that it runs where there is none.

#include "config.h"
#include "status.h"

#include <climits>
#include <cstdlib>

namespace w4a16 {
namespace {

// "sm_90a" -> 90; 0 if it is no architecture that this library packs for.
int architecture_number(const char *name) {
    if (std::strncmp(name, "sm_", 3) != 0 || name[3] < '1' || name[3] > '9') {
        return 0;
    }
    char *end = nullptr;
    const long number = std::strtol(name + 3, &end, 10);
    const bool suffix = (*end == 'a' || *end == 'f') && end[1] == '\0' && number >= 90;
    if (*end != '\0' && !suffix) {
        return 0;
    }
    static const int known[] = {75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121};
    for (const int candidate : known) {
        if (candidate == number) {
            return candidate;
        }
    }
    return 0;
}

w4a16_status check_shape(const char *arch, std::int64_t k, std::int64_t n, packing::Layout &layout) {
    const char *const name = arch == nullptr ? config::architecture : arch;
    const int number = architecture_number(name);
    if (number == 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT,
            "arch is \"%.40s\", expected sm_75, sm_80, sm_86, sm_87, sm_88, sm_89, sm_90, sm_100, sm_101, sm_103, "
            "sm_110, sm_120 or sm_121 (from 90 on also with a or f)", name);
    }
    layout = number == 90 ? config::sm90_layout : packing::Layout::interleaved;
    if (k <= 0 || k > INT_MAX || k % 64 != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "K is %lld, expected a positive multiple of 64 up to %d",
            static_cast<long long>(k), INT_MAX);
    }
    if (n <= 0 || n > INT_MAX || n % 8 != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "N is %lld, expected a positive multiple of 8 up to %d",
            static_cast<long long>(n), INT_MAX);
    }
    return W4A16_OK;
}

using Transform = void (*)(packing::Layout, const std::uint8_t *, std::int64_t, std::int64_t, std::uint8_t *, int);

w4a16_status apply(Transform transform, const char *arch, const void *source, const char *source_name, std::int64_t k,
    std::int64_t n, void *target, const char *target_name, std::int32_t threads) {
    packing::Layout layout{};
    if (const w4a16_status status = check_shape(arch, k, n, layout); status != W4A16_OK) {
        return status;
    }
    if (source == nullptr || target == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is NULL", source == nullptr ? source_name : target_name);
    }
    const auto from = reinterpret_cast<std::uintptr_t>(source);
    const auto to = reinterpret_cast<std::uintptr_t>(target);
    const auto bytes = static_cast<std::uintptr_t>(k / 2 * n);
    if (from < to + bytes && to < from + bytes) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s and %s overlap", source_name, target_name);
    }
    if (threads < 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "threads is %d, expected 0 (all cores) or more",
            static_cast<int>(threads));
    }
    return guarded([&] {
        transform(layout, static_cast<const std::uint8_t *>(source), k, n, static_cast<std::uint8_t *>(target),
            threads);
        return W4A16_OK;
    });
}

} // namespace
} // namespace w4a16

w4a16_status w4a16_packed_size(const char *arch, int64_t k, int64_t n, size_t *bytes) {
    using namespace w4a16;
    packing::Layout layout{};
    if (const w4a16_status status = check_shape(arch, k, n, layout); status != W4A16_OK) {
        return status;
    }
    if (bytes == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "bytes is NULL");
    }
    *bytes = static_cast<size_t>(k / 2 * n);
    return W4A16_OK;
}

w4a16_status w4a16_pack(const char *arch, const void *q, int64_t k, int64_t n, void *out, int32_t threads) {
    return w4a16::apply(w4a16::packing::pack, arch, q, "q", k, n, out, "out", threads);
}

w4a16_status w4a16_unpack(const char *arch, const void *packed, int64_t k, int64_t n, void *q, int32_t threads) {
    return w4a16::apply(w4a16::packing::unpack, arch, packed, "packed", k, n, q, "q", threads);
}
