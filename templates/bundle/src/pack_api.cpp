// Rendered from templates/bundle/src/pack_api.cpp; do not edit.

// The packing part of the C API that runs on the CPU; it uses no CUDA, so that it works where there is none.

#include "config.h"
#include "pack_check.h"
#include "status.h"

#include <algorithm>
#include <climits>
#include <cstdlib>

namespace w4a16 {
namespace {

using packing::Format;

static_assert(static_cast<int>(Format::plain) == W4A16_SOURCE_PLAIN
        && static_cast<int>(Format::gptq) == W4A16_SOURCE_GPTQ && static_cast<int>(Format::awq) == W4A16_SOURCE_AWQ
        && static_cast<int>(Format::compressed_tensors) == W4A16_SOURCE_COMPRESSED_TENSORS
        && static_cast<int>(Format::bytes) == W4A16_SOURCE_BYTES,
    "a w4a16_source is converted to a Format by its number");

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

// Of how many rows or columns a source is a multiple.
struct Multiples {
    int k;
    int n;
};

Multiples multiples_of(Format format) {
    switch (format) {
    case Format::gptq:
    case Format::compressed_tensors:
        return {8, 1};
    case Format::awq:
        return {1, 8};
    case Format::bytes:
        return {1, 1};
    case Format::plain:
        break;
    }
    return {1, 2};
}

w4a16_status check_source_extent(const char *name, std::int64_t extent, std::int64_t largest, int multiple) {
    if (extent < 1 || extent > largest || extent % multiple != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT,
            "args->%s is %lld, expected 1 to %lld and a multiple of %d for this source", name,
            static_cast<long long>(extent), static_cast<long long>(largest), multiple);
    }
    return W4A16_OK;
}

w4a16_status check_threads(std::int32_t threads) {
    if (threads < 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "threads is %d, expected 0 (all cores) or more",
            static_cast<int>(threads));
    }
    return W4A16_OK;
}

w4a16_status check_rows(const packing::Source &source, std::int64_t k) {
    for (std::int64_t i = 0; source.rows != nullptr && i < k; ++i) {
        if (source.rows[i] < -1 || source.rows[i] >= source.k) {
            return fail(W4A16_ERROR_INVALID_ARGUMENT, "args->rows[%lld] is %d, expected -1 to source_k - 1 (%lld)",
                static_cast<long long>(i), static_cast<int>(source.rows[i]), static_cast<long long>(source.k - 1));
        }
    }
    return W4A16_OK;
}

// For a source that holds a byte above 15.
w4a16_status large_byte(const packing::Source &source) {
    const std::uint8_t *const end = source.q + packing::source_bytes(source);
    const std::uint8_t *const found = std::find_if(source.q, end, [](std::uint8_t value) { return value > 15; });
    const std::int64_t at = found - source.q;
    return fail(W4A16_ERROR_INVALID_ARGUMENT, "args->q[%lld][%lld] is %d, expected 0 to 15",
        static_cast<long long>(at / source.n), static_cast<long long>(at % source.n),
        found == end ? -1 : static_cast<int>(*found));
}

} // namespace

w4a16_status check_packed(const char *arch, std::int64_t k, std::int64_t n, packing::Layout &layout) {
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

w4a16_status check_pack_args(const w4a16_pack_args *args, packing::Layout &layout, packing::Source &source) {
    if (const w4a16_status status = check_input(args, "args"); status != W4A16_OK) {
        return status;
    }
    if (args->source < W4A16_SOURCE_PLAIN || args->source > W4A16_SOURCE_BYTES) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "args->source is %d, expected a w4a16_source (0 to %d)",
            static_cast<int>(args->source), static_cast<int>(W4A16_SOURCE_BYTES));
    }
    if (const w4a16_status status = check_packed(args->arch, args->k, args->n, layout); status != W4A16_OK) {
        return status;
    }
    source = {static_cast<Format>(args->source), args->source_k, args->source_n,
        static_cast<const std::uint8_t *>(args->q), args->rows};
    const Multiples multiples = multiples_of(source.format);
    if (const w4a16_status status = check_source_extent("source_k", source.k, args->k, multiples.k);
        status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_source_extent("source_n", source.n, args->n, multiples.n);
        status != W4A16_OK) {
        return status;
    }
    const std::int64_t packed_bytes = args->k / 2 * args->n;
    if (source.rows != nullptr) {
        if (const w4a16_status status
            = check_buffers(source.rows, "rows", args->k * 4, args->out, "out", packed_bytes);
            status != W4A16_OK) {
            return status;
        }
    }
    return check_buffers(source.q, "q", packing::source_bytes(source), args->out, "out", packed_bytes);
}

} // namespace w4a16

w4a16_status w4a16_packed_size(const char *arch, int64_t k, int64_t n, size_t *bytes) {
    using namespace w4a16;
    packing::Layout layout{};
    if (const w4a16_status status = check_packed(arch, k, n, layout); status != W4A16_OK) {
        return status;
    }
    if (bytes == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "bytes is NULL");
    }
    *bytes = static_cast<size_t>(k / 2 * n);
    return W4A16_OK;
}

w4a16_status w4a16_pack(const char *arch, const void *q, int64_t k, int64_t n, void *out, int32_t threads) {
    w4a16_pack_args args{};
    args.struct_size = sizeof args;
    args.source = W4A16_SOURCE_PLAIN;
    args.arch = arch;
    args.k = args.source_k = k;
    args.n = args.source_n = n;
    args.q = q;
    args.out = out;
    return w4a16_pack_weight(&args, threads);
}

w4a16_status w4a16_pack_weight(const w4a16_pack_args *args, int32_t threads) {
    using namespace w4a16;
    packing::Layout layout{};
    packing::Source source{};
    if (const w4a16_status status = check_pack_args(args, layout, source); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_rows(source, args->k); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_threads(threads); status != W4A16_OK) {
        return status;
    }
    return guarded([&] {
        const bool good
            = packing::pack(layout, source, args->k, args->n, static_cast<std::uint8_t *>(args->out), threads);
        return good ? W4A16_OK : large_byte(source);
    });
}

w4a16_status w4a16_unpack(const char *arch, const void *packed, int64_t k, int64_t n, void *q, int32_t threads) {
    using namespace w4a16;
    packing::Layout layout{};
    if (const w4a16_status status = check_packed(arch, k, n, layout); status != W4A16_OK) {
        return status;
    }
    const std::int64_t bytes = k / 2 * n;
    if (const w4a16_status status = check_buffers(packed, "packed", bytes, q, "q", bytes); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_threads(threads); status != W4A16_OK) {
        return status;
    }
    return guarded([&] {
        packing::unpack(layout, static_cast<const std::uint8_t *>(packed), k, n, static_cast<std::uint8_t *>(q),
            threads);
        return W4A16_OK;
    });
}
