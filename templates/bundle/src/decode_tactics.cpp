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
    enum Refusal { none, group, rows, extent };
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
    return {Match::none, most_rows};
}

// When the kernel after this one may start, if that one is launched to overlap: early, its CTAs take what room there is
// at once, which with two of them an SM piles them up while this kernel still streams weights; late, after this one has
// asked for all of its weights.  Measured on an H200: late wins where all CTAs run at once and K is short.
decode::Dependence dependence_of(const DecodeTactic &tactic, const Launch &launch) {
    if (!launch.overlap) {
        return decode::independent;
    }
    const std::int64_t tiles = (launch.n + decode_rows(tactic) - 1) / decode_rows(tactic);
    const bool one_wave = tiles * tactic.cluster <= launch.sm_count;
    const bool late = launch.k <= 4096 || (one_wave && launch.k <= 14336);
    return late ? decode::release_late : decode::release_early;
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
    }
    return W4A16_OK;
}

bool decode_supports_quietly(const DecodeTactic &tactic, const Problem &problem) {
    return match(tactic, problem).refusal == Match::none;
}

int decode_rows(const DecodeTactic &tactic) {
    return tactic.kernels->first().rows;
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
    int count = 0;
    for (const int group : group_sizes) {
        if (kernels.of_group(group, false).function != nullptr) {
            info.groups[count++] = group;
        }
    }
}

void launch_decode(const DecodeTactic &tactic, const Launch &launch) {
    const decode::Kernel &kernel = tactic.kernels->of_group(launch.group_size, launch.zeros != nullptr);
    const cudaError_t error = decode::launch(kernel,
        {launch.a, launch.b, launch.scales, launch.zeros, launch.bias,
            {launch.outputs.c[0], launch.outputs.c[1], launch.outputs.c[2]},
            {launch.outputs.ends[0], launch.outputs.ends[1], launch.outputs.ends[2]}, launch.m, launch.n, launch.k,
            launch.group_size, launch.stream, dependence_of(tactic, launch), tactic.cluster});
    if (error != cudaSuccess) {
        throw std::runtime_error(std::string(tactic.name) + ": " + cudaGetErrorString(error));
    }
}

} // namespace w4a16
