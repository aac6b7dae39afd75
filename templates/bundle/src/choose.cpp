// Rendered from templates/bundle/src/choose.cpp; do not edit.

// The rule behind W4A16_AUTO; w4a16.h states it.

#include "decode_rules.h"
#include "decode_tactics.h"

#include <algorithm>
#include <climits>
#include <cstring>

namespace w4a16 {
namespace {

// The narrow tactics' most tokens: those alone take groups of 32, at any M.
constexpr int narrow_tokens = 16;

std::int64_t ceil_div(std::int64_t value, std::int64_t unit) {
    return (value + unit - 1) / unit;
}

const DecodeTactic *decode_named(const char *name) {
    const auto found = std::find_if(decode_tactics.begin(), decode_tactics.end(),
        [name](const DecodeTactic &tactic) { return std::strcmp(tactic.name, name) == 0; });
    return found == decode_tactics.end() ? nullptr : found;
}

bool holds(const DecodeRule &rule, const DecodeTactic &tactic, const Problem &problem, int sm_count) {
    const auto tiles = static_cast<float>(ceil_div(problem.n, decode_rows(tactic)));
    return (rule.tiles_an_sm == 0 || tiles <= rule.tiles_an_sm * static_cast<float>(sm_count))
        && tiles > rule.above * static_cast<float>(sm_count) && (rule.k == 0 || problem.k <= rule.k);
}

// Null where other tactics are better, or nothing fits.
const DecodeTactic *preferred_decode(const Problem &problem, int sm_count) {
    const int m = problem.group_size < 64 ? std::min(problem.m, narrow_tokens) : problem.m;
    for (const DecodeRule &rule : decode_rules) {
        if (m > rule.m) {
            continue;
        }
        const DecodeTactic *tactic = decode_named(rule.name);
        if (tactic != nullptr && decode_supports_quietly(*tactic, problem)
            && holds(rule, *tactic, problem, sm_count)) {
            return tactic;
        }
    }
    return nullptr;
}

// Null where nothing fits.
const DecodeTactic *cheapest_normalizing(const Problem &problem, int sm_count) {
    const DecodeTactic *best = nullptr;
    std::int64_t least = INT64_MAX;
    for (const DecodeTactic &tactic : decode_tactics) {
        const std::int64_t cost = decode_normalizing_cost(tactic, problem, sm_count);
        if (cost >= 0 && cost < least) {
            best = &tactic;
            least = cost;
        }
    }
    return best;
}

std::int32_t index_of(const DecodeTactic &tactic) {
    return first_decode_tactic() + static_cast<std::int32_t>(&tactic - decode_tactics.first);
}

// The smallest tile extent (a power of two from 16) that covers `rows`, at most `largest`.
int covering_tile(int rows, int largest) {
    int tile = 16;
    while (tile < rows && tile < largest) {
        tile *= 2;
    }
    return tile;
}

// Within one wave of the SMs, but not by much.
bool fills_one_wave(std::int64_t ctas, int sm_count) {
    return ctas <= sm_count && 4 * ctas > 3 * static_cast<std::int64_t>(sm_count);
}

// Whether tiles of `tile` rows compute at most a quarter more rows than there are.
bool little_padding(int rows, int tile) {
    return 4 * ceil_div(rows, tile) * tile <= 5ll * rows;
}

// The CTA tile (over N and M) that w4a16.h states.
void preferred_tile(const Problem &problem, int sm_count, int &tile_n, int &tile_m) {
    const int half = covering_tile(problem.m / 2, 256);
    if (fills_one_wave(ceil_div(problem.n, 64) * ceil_div(problem.m, half), sm_count)
        && (problem.m <= 128 || little_padding(problem.m, half)) && (problem.k <= 8192 || problem.m >= 512)) {
        tile_n = 64;
        tile_m = half;
        return;
    }
    tile_n = 128;
    tile_m = covering_tile(problem.m, 128);
    if (problem.m > 128 && little_padding(problem.m, 256)
        && 4 * ceil_div(problem.n, 128) * ceil_div(problem.m, 256) > 3ll * sm_count) {
        tile_m = 256;
    }
}

// Its sums in half lose at most 4 times what torch's FP16 matmul loses; with zeros and few inputs now and then more.
bool gemv_accurate(const Problem &problem) {
    return problem.quant_op != W4A16_GROUP_SCALE_ZERO || (problem.k >= 512 && problem.k <= 4096);
}

bool gemv_faster(const Problem &problem) {
    const std::int64_t weights = static_cast<std::int64_t>(problem.n) * problem.k;
    if (problem.quant_op == W4A16_GROUP_SCALE_ZERO) {
        return problem.m <= 2 || (problem.m <= 4 && weights <= 32000000) || (problem.m <= 6 && weights <= 24000000);
    }
    return problem.m <= 2 || (problem.m <= 4 && weights <= 100000000) || (problem.m <= 8 && weights <= 32000000);
}

// How far a tactic is from the wanted tile: the row tile counts most, then the column tile, then the cluster.
int distance(const GemmTactic &tactic, int tile_n, int tile_m) {
    int steps = 0;
    for (int tile = std::min(tile_m, tactic.tile[1]); tile < std::max(tile_m, tactic.tile[1]); tile *= 2) {
        ++steps;
    }
    const int cluster = tactic.cluster[0] * tactic.cluster[1] * tactic.cluster[2];
    return 16 * steps + (tactic.tile[0] != tile_n ? 8 : 0) + cluster - 1;
}

} // namespace

bool choose_normalizing(const Problem &problem, int sm_count, std::int32_t &index) {
    const DecodeTactic *const found = cheapest_normalizing(problem, sm_count);
    if (found == nullptr) {
        return false;
    }
    index = index_of(*found);
    return true;
}

w4a16_status choose(const Problem &problem, int sm_count, std::int32_t &index) {
    if (const DecodeTactic *tactic = preferred_decode(problem, sm_count); problem.m > 0 && tactic != nullptr) {
        index = index_of(*tactic);
        return W4A16_OK;
    }
    const int gemv = gemm_tactics.count;
    const bool has_gemv = gemv_supports_quietly(problem) && gemv_accurate(problem);
    if (has_gemv && gemv_faster(problem)) {
        index = gemv;
        return W4A16_OK;
    }
    int tile_n = 0;
    int tile_m = 0;
    preferred_tile(problem, sm_count, tile_n, tile_m);
    int best = INT_MAX;
    w4a16_status status = W4A16_ERROR_UNSUPPORTED;
    for (int candidate = 0; candidate < gemm_tactics.count; ++candidate) {
        const int away = distance(gemm_tactics.first[candidate], tile_n, tile_m);
        if (away >= best) {
            continue;
        }
        status = supports(candidate, problem);
        if (status == W4A16_OK) {
            best = away;
            index = candidate;
        }
    }
    if (best != INT_MAX) {
        return W4A16_OK;
    }
    // A build without GEMM kernels for this problem may still have the GEMV, slow or not.
    if (has_gemv) {
        index = gemv;
        return W4A16_OK;
    }
    // Groups that a GEMM does not take, in a build that lacks what the rule names.
    for (const DecodeTactic &tactic : decode_tactics) {
        if (decode_supports_quietly(tactic, problem)) {
            index = index_of(tactic);
            return W4A16_OK;
        }
    }
    return status;
}

} // namespace w4a16
