// Rendered from templates/bundle/src/status.cpp; do not edit.

// The last error of each thread, the names of the status codes, and what many functions check.

#include "status.h"

#include <cstdarg>
#include <cstdio>

namespace w4a16 {
namespace {

// A fixed buffer: reporting an error must not fail.
thread_local char last_error[768];

} // namespace

w4a16_status fail(w4a16_status status, const char *format, ...) {
    std::va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(last_error, sizeof last_error, format, arguments);
    va_end(arguments);
    return status;
}

w4a16_status check_buffers(const void *source, const char *source_name, std::int64_t source_bytes, const void *target,
    const char *target_name, std::int64_t target_bytes) {
    if (source == nullptr || target == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is NULL", source == nullptr ? source_name : target_name);
    }
    const auto from = reinterpret_cast<std::uintptr_t>(source);
    const auto to = reinterpret_cast<std::uintptr_t>(target);
    const auto from_end = from + static_cast<std::uintptr_t>(source_bytes);
    const auto to_end = to + static_cast<std::uintptr_t>(target_bytes);
    if (from < to_end && to < from_end) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s and %s overlap", source_name, target_name);
    }
    return W4A16_OK;
}

} // namespace w4a16

const char *w4a16_last_error(void) {
    return w4a16::last_error;
}

const char *w4a16_status_name(w4a16_status status) {
    switch (status) {
    case W4A16_OK:
        return "W4A16_OK";
    case W4A16_ERROR_INVALID_ARGUMENT:
        return "W4A16_ERROR_INVALID_ARGUMENT";
    case W4A16_ERROR_MISALIGNED:
        return "W4A16_ERROR_MISALIGNED";
    case W4A16_ERROR_UNSUPPORTED:
        return "W4A16_ERROR_UNSUPPORTED";
    case W4A16_ERROR_UNKNOWN_TACTIC:
        return "W4A16_ERROR_UNKNOWN_TACTIC";
    case W4A16_ERROR_WORKSPACE:
        return "W4A16_ERROR_WORKSPACE";
    case W4A16_ERROR_NO_DEVICE:
        return "W4A16_ERROR_NO_DEVICE";
    case W4A16_ERROR_OLD_DRIVER:
        return "W4A16_ERROR_OLD_DRIVER";
    case W4A16_ERROR_WRONG_DEVICE:
        return "W4A16_ERROR_WRONG_DEVICE";
    case W4A16_ERROR_CUDA:
        return "W4A16_ERROR_CUDA";
    case W4A16_ERROR_OUT_OF_MEMORY:
        return "W4A16_ERROR_OUT_OF_MEMORY";
    case W4A16_ERROR_INTERNAL:
        return "W4A16_ERROR_INTERNAL";
    }
    return "unknown status";
}
