// Rendered from templates/bundle/src/tactics.cpp; do not edit.

// What each tactic can do.

#include "tactics.h"

#include "config.h"
#include "decode_tactics.h"
#include "status.h"

#include <algorithm>
#include <climits>

namespace w4a16 {
namespace {

const char *const quant_op_names[quant_op_count] = {"per_column", "group_scale", "group_scale_zero"};

constexpr int largest_grid_y = 65535;

// GemvFamily::rows has a bit for each M.
constexpr int largest_gemv_rows = 63;

// TMA wants 16-byte strides: 8 halves of scales, bias and output (N), 32 nibbles of weights (K).  The tile's K, 64, is
// also the unit of group sizes and of the packed layouts.
constexpr int column_unit = 8;
constexpr int depth_unit = 64;

// Whether the GEMV has a kernel, or why not.  Wording a refusal costs more than finding one, and the choice of a tactic
// need not say why.
struct GemvMatch {
    enum Refusal { none, quantization, rows, columns, offsets };
    Refusal refusal;
    const GemvFamily *family; // null with Refusal::quantization
};

GemvMatch match_gemv(const Problem &problem) {
    const int group_size = problem.quant_op == W4A16_PER_COLUMN ? 0 : problem.group_size;
    for (const GemvFamily &family : gemv_families) {
        if (family.quant_op != problem.quant_op || family.group_size != group_size || family.bias != problem.has_bias) {
            continue;
        }
        if (problem.m > largest_gemv_rows || (family.rows >> problem.m & 1) == 0) {
            return {GemvMatch::rows, &family};
        }
        if (problem.n % family.columns_per_cta != 0 || problem.n / family.columns_per_cta > largest_grid_y) {
            return {GemvMatch::columns, &family};
        }
        // The kernel's offsets are ints that count elements.
        if (static_cast<std::int64_t>(problem.n) * problem.k > INT_MAX) {
            return {GemvMatch::offsets, &family};
        }
        return {GemvMatch::none, &family};
    }
    return {GemvMatch::quantization, nullptr};
}

w4a16_status gemv_supports(const Problem &problem) {
    const GemvMatch match = match_gemv(problem);
    switch (match.refusal) {
    case GemvMatch::none:
        break;
    case GemvMatch::quantization:
        return fail(W4A16_ERROR_UNSUPPORTED, "gemv: this build has no kernel for %s, group size %d, %s bias",
            quant_op_names[problem.quant_op], problem.group_size, problem.has_bias ? "with" : "without");
    case GemvMatch::rows:
        return fail(W4A16_ERROR_UNSUPPORTED, "gemv: this build has no kernel for M = %d", problem.m);
    case GemvMatch::columns:
        return fail(W4A16_ERROR_UNSUPPORTED, "gemv: N = %d must be a multiple of %d and at most %d", problem.n,
            match.family->columns_per_cta, match.family->columns_per_cta * largest_grid_y);
    case GemvMatch::offsets:
        return fail(W4A16_ERROR_UNSUPPORTED, "gemv: N * K = %lld is beyond the %d that its 32-bit offsets reach",
            static_cast<long long>(problem.n) * problem.k, INT_MAX);
    }
    return W4A16_OK;
}

w4a16_status gemm_supports(const GemmTactic &tactic, const Problem &problem) {
    if (tactic.launch[problem.quant_op] == nullptr) {
        return fail(W4A16_ERROR_UNSUPPORTED, "%s: this build has no %s kernel", tactic.name,
            quant_op_names[problem.quant_op]);
    }
    if (problem.quant_op != W4A16_PER_COLUMN && problem.group_size % tactic.tile[2] != 0) {
        return fail(W4A16_ERROR_UNSUPPORTED, "%s: group size %d is not a multiple of %d", tactic.name,
            problem.group_size, tactic.tile[2]);
    }
    // The scheduler counts tiles in 32 bits.
    const std::int64_t tiles = (problem.n / tactic.tile[0] + 2ll) * (problem.m / tactic.tile[1] + 2ll);
    if (tiles > INT_MAX) {
        return fail(W4A16_ERROR_UNSUPPORTED, "%s: M = %d and N = %d make more tiles than its scheduler can count",
            tactic.name, problem.m, problem.n);
    }
    return W4A16_OK;
}

// Null for a tactic of another kind.
const DecodeTactic *decode_tactic(std::int32_t index) {
    const int place = index - first_decode_tactic();
    return place < 0 ? nullptr : decode_tactics.first + place;
}

} // namespace

w4a16_status check_problem(const w4a16_problem *given, Problem &problem) {
    if (const w4a16_status status = check_input(given, "problem"); status != W4A16_OK) {
        return status;
    }
    if (given->quant_op < 0 || given->quant_op >= quant_op_count) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "quant_op is %d, expected a w4a16_quant_op (0 to %d)",
            static_cast<int>(given->quant_op), quant_op_count - 1);
    }
    if (given->reserved != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "problem->reserved is %d, expected 0",
            static_cast<int>(given->reserved));
    }
    if (given->has_bias != 0 && given->has_bias != 1) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "has_bias is %d, expected 0 or 1", static_cast<int>(given->has_bias));
    }
    const auto out_of_range = [](std::int64_t value, std::int64_t least) { return value < least || value > INT_MAX; };
    if (out_of_range(given->m, 0)) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "M is %lld, expected 0 to %d",
            static_cast<long long>(given->m), INT_MAX);
    }
    if (out_of_range(given->n, column_unit) || given->n % column_unit != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "N is %lld, expected a positive multiple of %d up to %d",
            static_cast<long long>(given->n), column_unit, INT_MAX);
    }
    if (out_of_range(given->k, depth_unit) || given->k % depth_unit != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "K is %lld, expected a positive multiple of %d up to %d",
            static_cast<long long>(given->k), depth_unit, INT_MAX);
    }
    const bool per_column = given->quant_op == W4A16_PER_COLUMN;
    if (per_column && given->group_size != 0 && given->group_size != given->k) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "group_size is %lld, expected 0 or K = %lld for per-column scales",
            static_cast<long long>(given->group_size), static_cast<long long>(given->k));
    }
    if (!per_column && (given->group_size <= 0 || given->k % given->group_size != 0)) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "group_size is %lld, expected a positive divisor of K = %lld",
            static_cast<long long>(given->group_size), static_cast<long long>(given->k));
    }
    problem.quant_op = static_cast<w4a16_quant_op>(given->quant_op);
    problem.m = static_cast<int>(given->m);
    problem.n = static_cast<int>(given->n);
    problem.k = static_cast<int>(given->k);
    problem.group_size = static_cast<int>(per_column ? given->k : given->group_size);
    problem.has_bias = given->has_bias != 0;
    return W4A16_OK;
}

int first_decode_tactic() {
    return gemm_tactics.count + (gemv_families.count > 0 ? 1 : 0);
}

int tactic_count() {
    return first_decode_tactic() + decode_tactics.count;
}

w4a16_status check_tactic(std::int32_t index) {
    if (index < 0 || index >= tactic_count()) {
        return fail(W4A16_ERROR_UNKNOWN_TACTIC, "tactic index is %d, expected 0 to %d, or W4A16_AUTO",
            static_cast<int>(index), tactic_count() - 1);
    }
    return W4A16_OK;
}

bool splits_columns(std::int32_t index) {
    return decode_tactic(index) != nullptr;
}

bool normalizes(std::int32_t index, const Problem &problem) {
    const DecodeTactic *const tactic = decode_tactic(index);
    return tactic != nullptr && decode_normalizing_cost(*tactic, problem, 1) >= 0;
}

bool is_gemv(std::int32_t index) {
    return index == gemm_tactics.count && gemv_families.count > 0;
}

w4a16_status supports(std::int32_t index, const Problem &problem) {
    if (problem.m == 0) {
        return W4A16_OK; // nothing is launched
    }
    if (is_gemv(index)) {
        return gemv_supports(problem);
    }
    if (const DecodeTactic *tactic = decode_tactic(index); tactic != nullptr) {
        return decode_supports(*tactic, problem);
    }
    return gemm_supports(gemm_tactics.first[index], problem);
}

bool gemv_supports_quietly(const Problem &problem) {
    return match_gemv(problem).refusal == GemvMatch::none;
}

void launch_tactic(std::int32_t index, const Problem &problem, const Launch &launch) {
    if (const DecodeTactic *tactic = decode_tactic(index); tactic != nullptr) {
        launch_decode(*tactic, launch);
    } else if (is_gemv(index)) {
        match_gemv(problem).family->launch(launch);
    } else {
        gemm_tactics.first[index].launch[problem.quant_op](launch);
    }
}

bool needs_sm_count(std::int32_t index) {
    if (const DecodeTactic *tactic = decode_tactic(index); tactic != nullptr) {
        return decode_uses_workspace(*tactic);
    }
    return index < gemm_tactics.count && gemm_tactics.first[index].uses_workspace;
}

std::size_t workspace_size(std::int32_t index, const Problem &problem, int sm_count) {
    if (problem.m == 0 || !needs_sm_count(index)) {
        return 0;
    }
    if (const DecodeTactic *tactic = decode_tactic(index); tactic != nullptr) {
        return decode_workspace(*tactic, problem, sm_count);
    }
    return gemm_tactics.first[index].workspace[problem.quant_op](problem.m, problem.n, problem.k, sm_count);
}

} // namespace w4a16

int32_t w4a16_tactic_count(void) {
    return w4a16::tactic_count();
}

w4a16_status w4a16_tactic(int32_t index, w4a16_tactic_info *info) {
    using namespace w4a16;
    if (const w4a16_status status = check_output(info, "info"); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_tactic(index); status != W4A16_OK) {
        return status;
    }
    w4a16_tactic_info found{};
    found.index = index;
    if (is_gemv(index)) {
        found.name = "gemv";
        found.kind = "gemv";
        found.schedule = "cuda-core";
        std::uint64_t rows = 0;
        int groups = 0;
        constexpr int most_groups = static_cast<int>(sizeof found.groups / sizeof found.groups[0]) - 1;
        for (const GemvFamily &family : gemv_families) {
            rows |= family.rows;
            found.quant_ops |= 1u << family.quant_op;
            int32_t *const end = found.groups + groups;
            const bool listed = std::find(found.groups, end, family.group_size) != end;
            if (family.group_size != 0 && !listed && groups < most_groups) {
                found.groups[groups++] = family.group_size;
            }
        }
        std::sort(found.groups, found.groups + groups);
        found.m_min = __builtin_ctzll(rows);
        found.m_max = 63 - __builtin_clzll(rows);
    } else if (const DecodeTactic *own = decode_tactic(index); own != nullptr) {
        describe_decode(*own, found);
    } else {
        const GemmTactic &tactic = gemm_tactics.first[index];
        found.name = tactic.name;
        found.kind = "gemm";
        found.schedule = tactic.schedule;
        std::copy(tactic.tile, tactic.tile + 3, found.tile);
        std::copy(tactic.cluster, tactic.cluster + 3, found.cluster);
        found.m_min = 1;
        found.m_max = INT_MAX;
        for (int quant_op = 0; quant_op < quant_op_count; ++quant_op) {
            found.quant_ops |= tactic.launch[quant_op] != nullptr ? 1u << quant_op : 0u;
        }
        found.group_multiple = tactic.tile[2];
        found.uses_workspace = tactic.uses_workspace ? 1 : 0;
    }
    fill_output(info, found);
    return W4A16_OK;
}

w4a16_status w4a16_find_tactic(const char *name, int32_t *index) {
    using namespace w4a16;
    if (name == nullptr || index == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is NULL", name == nullptr ? "name" : "index");
    }
    if (std::strcmp(name, "auto") == 0) {
        *index = W4A16_AUTO;
        return W4A16_OK;
    }
    for (int candidate = 0; candidate < gemm_tactics.count; ++candidate) {
        if (std::strcmp(name, gemm_tactics.first[candidate].name) == 0) {
            *index = candidate;
            return W4A16_OK;
        }
    }
    for (int place = 0; place < decode_tactics.count; ++place) {
        if (std::strcmp(name, decode_tactics.first[place].name) == 0) {
            *index = first_decode_tactic() + place;
            return W4A16_OK;
        }
    }
    if (std::strcmp(name, "gemv") == 0) {
        if (gemv_families.count == 0) {
            return fail(W4A16_ERROR_UNKNOWN_TACTIC, "this build has no gemv: %s", config::gemv_reason);
        }
        *index = gemm_tactics.count;
        return W4A16_OK;
    }
    return fail(W4A16_ERROR_UNKNOWN_TACTIC, "no tactic is named \"%.100s\"; w4a16_info lists them", name);
}
