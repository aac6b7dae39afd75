// Rendered from templates/bundle/src/extents.h; do not edit.

// Sizes that come from the caller, and how they are refused.

#pragma once

#include "status.h"

#include <climits>

namespace w4a16 {

inline w4a16_status check_extent(const char *name, std::int64_t extent, std::int64_t least, std::int64_t most = INT_MAX) {
    if (extent < least || extent > most) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is %lld, expected %lld to %lld", name,
            static_cast<long long>(extent), static_cast<long long>(least), static_cast<long long>(most));
    }
    return W4A16_OK;
}

inline w4a16_status check_multiple(const char *name, std::int64_t extent, std::int64_t unit) {
    if (extent % unit != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is %lld, expected a multiple of %lld", name,
            static_cast<long long>(extent), static_cast<long long>(unit));
    }
    return W4A16_OK;
}

constexpr int most_segments = 3;

// How many of three segments there are: those without columns come last.
inline w4a16_status count_segments(const std::int64_t (&n)[most_segments], const char *name, int &count) {
    count = 0;
    std::int64_t sum = 0;
    for (int i = 0; i < most_segments; ++i) {
        if (n[i] < 0 || n[i] % 8 != 0 || (n[i] > 0 && count < i) || (sum += n[i]) > INT_MAX) {
            return fail(W4A16_ERROR_INVALID_ARGUMENT,
                "%s is %lld, %lld, %lld: expected multiples of 8 whose sum is at most %d, those that are 0 last", name,
                static_cast<long long>(n[0]), static_cast<long long>(n[1]), static_cast<long long>(n[2]), INT_MAX);
        }
        count += n[i] > 0 ? 1 : 0;
    }
    if (count == 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is 0, 0, 0: expected at least one segment", name);
    }
    return W4A16_OK;
}

} // namespace w4a16
