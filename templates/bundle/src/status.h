// Rendered from templates/bundle/src/status.h; do not edit.

// Status codes with a message for the calling thread.

#pragma once

#include "w4a16.h"

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <new>

namespace w4a16 {

// Stores the message (printf format) and returns `status`.
[[gnu::format(printf, 2, 3)]] w4a16_status fail(w4a16_status status, const char *format, ...);

// Runs `work`, which returns a status, and turns whatever it throws into one: nothing may leave through the C API.
template <typename Work>
w4a16_status guarded(Work work) {
    try {
        return work();
    } catch (const std::bad_alloc &) {
        return fail(W4A16_ERROR_OUT_OF_MEMORY, "host memory ran out");
    } catch (const std::exception &error) {
        return fail(W4A16_ERROR_INTERNAL, "%s", error.what());
    } catch (...) {
        return fail(W4A16_ERROR_INTERNAL, "unknown C++ exception");
    }
}

// Whether a struct that the caller filled can be read as a T: it is a T, or a later and longer one that uses none of
// the members that this library does not know.
template <typename T>
w4a16_status check_input(const T *value, const char *name) {
    if (value == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is NULL", name);
    }
    if (value->struct_size < sizeof(T)) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT,
            "%s->struct_size is %u, expected at least %zu: set it to sizeof the struct", name,
            static_cast<unsigned>(value->struct_size), sizeof(T));
    }
    const unsigned char *bytes = reinterpret_cast<const unsigned char *>(value);
    // Far more than any version will need: a struct_size beyond it was never set.
    constexpr std::uint32_t largest = 4096;
    if (value->struct_size > largest) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s->struct_size is %u: set it to sizeof the struct", name,
            static_cast<unsigned>(value->struct_size));
    }
    for (std::size_t i = sizeof(T); i < value->struct_size; ++i) {
        if (bytes[i] != 0) {
            return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s uses members of a later API than version %u", name,
                static_cast<unsigned>(W4A16_API_VERSION));
        }
    }
    return W4A16_OK;
}

// Whether a struct that this library fills has room for a T.
template <typename T>
w4a16_status check_output(const T *value, const char *name) {
    if (value == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is NULL", name);
    }
    if (value->struct_size < sizeof(T)) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT,
            "%s->struct_size is %u, expected at least %zu: set it to sizeof the struct", name,
            static_cast<unsigned>(value->struct_size), sizeof(T));
    }
    return W4A16_OK;
}

// Copies all but struct_size, which stays as the caller set it.
template <typename T>
void fill_output(T *target, T source) {
    source.struct_size = target->struct_size;
    std::memcpy(target, &source, sizeof(T));
}

// Whether `source_bytes` can be read while `target_bytes` are written: neither is NULL, and they do not overlap.
w4a16_status check_buffers(const void *source, const char *source_name, std::int64_t source_bytes, const void *target,
    const char *target_name, std::int64_t target_bytes);

} // namespace w4a16
