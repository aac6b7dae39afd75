// Rendered from templates/bundle/src/decode_tactics.cpp; do not edit.

#include "decode_tactics.h"

#include "decode/launch.h"
#include "status.h"

#include <algorithm>
#include <iterator>
#include <stdexcept>
#include <string>

namespace w4a16 {
namespace {

constexpr int group_sizes[] = {32, 64, 128, 256};

// A row of CTAs in y for each block of rows of activations.
constexpr std::int64_t largest_grid_y = 65535;

// Their offsets along N and K are ints that reach a tile beyond the end.
constexpr int largest_extent = 1 << 30;

struct Match {
    enum Refusal { none, group, rows, extent, stages };
    Refusal refusal;
    std::int64_t most_rows;
};

Match match(const DecodeTactic &tactic, const Problem &problem) {
    const decode::Kernels &kernels = *tactic.kernels;
    const bool zeros = problem.quant_op == W4A16_GROUP_SCALE_ZERO;
    const std::int64_t most_rows = largest_grid_y * kernels.first().tokens;
    const int group = problem.group_size;
    const bool listed = std::find(std::begin(group_sizes), std::end(group_sizes), group) != std::end(group_sizes);
    if ((!listed && group != problem.k) || kernels.of_group(group, zeros).function == nullptr) {
        return {Match::group, most_rows};
    }
    if (problem.m > most_rows) {
        return {Match::rows, most_rows};
    }
    if (problem.n > largest_extent || problem.k > largest_extent) {
        return {Match::extent, most_rows};
    }
    if (decode_uses_workspace(tactic) && !decode::streams_all(kernels.first(), problem.m, problem.n, problem.k)) {
        return {Match::stages, most_rows};
    }
    return {Match::none, most_rows};
}

// Whether all CTAs of a launch run at once, one an SM.
bool fit_one_an_sm(const DecodeTactic &tactic, const Launch &launch) {
    const int streams = tactic.kernels->first().streams;
    if (streams > 0) {
        return streams == 1;
    }
    const int tokens = tactic.kernels->first().tokens;
    const std::int64_t tiles = (static_cast<std::int64_t>(launch.n) + decode_rows(tactic) - 1) / decode_rows(tactic);
    const std::int64_t token_tiles = (static_cast<std::int64_t>(launch.m) + tokens - 1) / tokens;
    return tiles * token_tiles * tactic.cluster <= launch.sm_count;
}

// When the kernel after this one may start, if that one is launched to overlap: early, its CTAs take what room there is
// at once, which with two of them an SM piles them up while this kernel still streams weights; late, after this one has
// asked for all of its weights.  Measured on an H200 with two CTAs an SM: where all CTAs fit with one an SM late is 1.1 to
// 1.6 times faster, elsewhere early is 1.05 to 1.2 times faster.  With one CTA an SM it hardly matters.
decode::Dependence dependence_of(const DecodeTactic &tactic, const Launch &launch) {
    if (!launch.overlap) {
        return decode::independent;
    }
    return fit_one_an_sm(tactic, launch) ? decode::release_late : decode::release_early;
}

// Whether no other CTA may share an SM with one of this launch, where two fit and one an SM is all there are.  Behind a norm
// they start at a moment when some SMs are free and others not, and would take the free ones in pairs: 9.2 us in place of
// 7.6 (48x8:o2, M = 8, N = 6144, on an H200).
bool alone_on_sm(const DecodeTactic &tactic, const Launch &launch) {
    return launch.follows_norm && fit_one_an_sm(tactic, launch);
}

} // namespace

w4a16_status decode_supports(const DecodeTactic &tactic, const Problem &problem) {
    const Match found = match(tactic, problem);
    switch (found.refusal) {
    case Match::none:
        break;
    case Match::group:
        return fail(W4A16_ERROR_UNSUPPORTED, "%s: group size %d is not one of %s64, 128, 256, nor K = %d", tactic.name,
            problem.group_size, tactic.kernels->of_group(32, false).function != nullptr ? "32, " : "", problem.k);
    case Match::rows:
        return fail(W4A16_ERROR_UNSUPPORTED, "%s: M = %d is beyond the %lld rows that its grid reaches", tactic.name,
            problem.m, static_cast<long long>(found.most_rows));
    case Match::extent:
        return fail(W4A16_ERROR_UNSUPPORTED, "%s: N = %d or K = %d is beyond the %d that its 32-bit offsets reach",
            tactic.name, problem.n, problem.k, largest_extent);
    case Match::stages:
        return fail(W4A16_ERROR_UNSUPPORTED, "%s: M = %d, N = %d and K = %d make more stages than it can count",
            tactic.name, problem.m, problem.n, problem.k);
    }
    return W4A16_OK;
}

bool decode_supports_quietly(const DecodeTactic &tactic, const Problem &problem) {
    return match(tactic, problem).refusal == Match::none;
}

bool decode_uses_workspace(const DecodeTactic &tactic) {
    return tactic.kernels->first().streams > 0;
}

std::size_t decode_workspace(const DecodeTactic &tactic, const Problem &problem, int sm_count) {
    return decode::workspace_bytes(tactic.kernels->first(), problem.m, problem.n, problem.k, sm_count);
}

int decode_rows(const DecodeTactic &tactic) {
    return tactic.kernels->first().rows;
}

std::int64_t decode_normalizing_cost(const DecodeTactic &tactic, const Problem &problem, int sm_count) {
    const decode::NormalizingKernel &kernel
        = tactic.kernels->normalizing_of_group(problem.group_size, problem.quant_op == W4A16_GROUP_SCALE_ZERO);
    if (kernel.function == nullptr || problem.m == 0 || match(tactic, problem).refusal != Match::none) {
        return -1;
    }
    if (!decode::fits(kernel, problem.m, problem.k)) {
        return -1;
    }
    // By the rows that the busiest SM multiplies, and a little more for each tile, as each normalises again.
    constexpr int of_tile = 8;
    const std::int64_t tiles = (static_cast<std::int64_t>(problem.n) + kernel.shape.rows - 1) / kernel.shape.rows;
    return (tiles + sm_count - 1) / sm_count * (kernel.shape.rows + of_tile);
}

void describe_decode(const DecodeTactic &tactic, w4a16_tactic_info &info) {
    const decode::Kernels &kernels = *tactic.kernels;
    const decode::Kernel &kernel = kernels.first();
    info.name = tactic.name;
    info.kind = "decode";
    info.schedule = tactic.schedule;
    info.tile[0] = kernel.rows;
    info.tile[1] = kernel.tokens;
    info.tile[2] = kernel.stage_k;
    info.cluster[0] = info.cluster[1] = 1;
    info.cluster[2] = tactic.cluster;
    info.m_min = 1;
    info.m_max = largest_grid_y * kernel.tokens;
    info.quant_ops = (1u << quant_op_count) - 1;
    info.uses_workspace = decode_uses_workspace(tactic) ? 1 : 0;
    int count = 0;
    for (const int group : group_sizes) {
        if (kernels.of_group(group, false).function != nullptr) {
            info.groups[count++] = group;
        }
    }
}

void launch_decode(const DecodeTactic &tactic, const Launch &launch) {
    const decode::Kernels &kernels = *tactic.kernels;
    const bool zeros = launch.zeros != nullptr;
    const decode::Launch own{launch.a, launch.b, launch.scales, launch.zeros, launch.bias,
        {launch.outputs.c[0], launch.outputs.c[1], launch.outputs.c[2]},
        {launch.outputs.ends[0], launch.outputs.ends[1], launch.outputs.ends[2]}, launch.m, launch.n, launch.k,
        launch.group_size, launch.stream, dependence_of(tactic, launch), tactic.cluster, alone_on_sm(tactic, launch),
        launch.workspace, launch.sm_count};
    const cudaError_t error = launch.norm != nullptr
        ? decode::launch_normalizing(kernels.normalizing_of_group(launch.group_size, zeros), own, *launch.norm)
        : decode::launch(kernels.of_group(launch.group_size, zeros), own);
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(tactic.name) + ": " + cudaGetErrorString(error));
    }
}

} // namespace w4a16
