// Rendered from templates/bundle/src/launch.cpp; do not edit.

// The entry points that compute: every argument is checked here, before anything is launched.

#include "launch.h"

#include "tactics.h"

namespace w4a16 {
namespace {

constexpr std::uintptr_t pointer_alignment = 16;

// Resolves W4A16_AUTO and checks that the tactic has a kernel.
w4a16_status resolve(std::int32_t given, const Problem &problem, std::int32_t &index) {
    if (given == W4A16_AUTO) {
        return choose(problem, sm_count_or_default(), index);
    }
    if (const w4a16_status status = check_tactic(given); status != W4A16_OK) {
        return status;
    }
    index = given;
    return supports(index, problem);
}

w4a16_status check_pointers(const w4a16_args &args, const Problem &problem, bool has_norm) {
    const bool zeros = problem.quant_op == W4A16_GROUP_SCALE_ZERO;
    const struct {
        const void *pointer;
        const char *name;
        bool wanted;
    } pointers[] = {
        {args.a, "a", !has_norm},
        {args.b, "b", true},
        {args.scales, "scales", true},
        {args.zeros, "zeros", zeros},
        {args.bias, "bias", problem.has_bias},
        {args.c, "c", true},
        {args.workspace, "workspace", args.workspace != nullptr},
    };
    for (const auto &item : pointers) {
        if (!item.wanted) {
            if (item.pointer != nullptr) {
                return fail(W4A16_ERROR_INVALID_ARGUMENT, "%s is not NULL, but this problem has none", item.name);
            }
            continue;
        }
        if (const w4a16_status status = check_pointer(item.pointer, item.name, pointer_alignment);
            status != W4A16_OK) {
            return status;
        }
    }
    return W4A16_OK;
}

} // namespace

w4a16_status run(std::int32_t tactic, const w4a16_args *args, const Part &part, CUstream_st *stream) {
    if (const w4a16_status status = check_input(args, "args"); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_flags(args->flags); status != W4A16_OK) {
        return status;
    }
    Problem problem{};
    if (const w4a16_status status = check_problem(args->problem, problem); status != W4A16_OK) {
        return status;
    }
    if (tactic != W4A16_AUTO) {
        if (const w4a16_status status = check_tactic(tactic); status != W4A16_OK) {
            return status;
        }
    }
    if (problem.m == 0) {
        return W4A16_OK;
    }
    std::int32_t index = 0;
    if (const w4a16_status status = resolve(tactic, problem, index); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointers(*args, problem, part.norm != nullptr); status != W4A16_OK) {
        return status;
    }
    int sm_count = 0;
    if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = ensure_context(); status != W4A16_OK) {
        return status;
    }
    const std::size_t needed = workspace_size(index, problem, sm_count);
    if (needed > 0 && (args->workspace == nullptr || args->workspace_bytes < needed)) {
        return fail(W4A16_ERROR_WORKSPACE, "workspace has %zu bytes, this tactic and problem need %zu",
            args->workspace == nullptr ? std::size_t{0} : args->workspace_bytes, needed);
    }
    Launch launch{};
    launch.a = args->a;
    launch.b = args->b;
    launch.scales = args->scales;
    launch.zeros = args->zeros;
    launch.bias = args->bias;
    launch.c = args->c;
    const int n = problem.n;
    launch.outputs = part.outputs != nullptr ? *part.outputs : Outputs{{args->c, args->c, args->c}, {n, n, n}};
    launch.m = problem.m;
    launch.n = problem.n;
    launch.k = problem.k;
    launch.group_size = problem.group_size;
    launch.workspace = args->workspace;
    launch.workspace_bytes = needed;
    launch.stream = stream;
    launch.overlap = (args->flags & W4A16_RUN_OVERLAP) != 0;
    launch.sm_count = sm_count;
    launch.norm = part.norm;
    launch.follows_norm = part.follows_norm;
    return launched([&] { launch_tactic(index, problem, launch); });
}

} // namespace w4a16

w4a16_status w4a16_supports(int32_t tactic, const w4a16_problem *given) {
    using namespace w4a16;
    Problem problem{};
    if (const w4a16_status status = check_problem(given, problem); status != W4A16_OK) {
        return status;
    }
    std::int32_t index = 0;
    return resolve(tactic, problem, index);
}

w4a16_status w4a16_auto_tactic(const w4a16_problem *given, int32_t *tactic) {
    using namespace w4a16;
    Problem problem{};
    if (const w4a16_status status = check_problem(given, problem); status != W4A16_OK) {
        return status;
    }
    if (tactic == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "tactic is NULL");
    }
    return resolve(W4A16_AUTO, problem, *tactic);
}

w4a16_status w4a16_workspace_size(int32_t tactic, const w4a16_problem *given, size_t *bytes) {
    using namespace w4a16;
    Problem problem{};
    if (const w4a16_status status = check_problem(given, problem); status != W4A16_OK) {
        return status;
    }
    if (bytes == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "bytes is NULL");
    }
    std::int32_t index = 0;
    if (const w4a16_status status = resolve(tactic, problem, index); status != W4A16_OK) {
        return status;
    }
    int sm_count = 0;
    if (problem.m > 0 && needs_sm_count(index)) {
        if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
            return status;
        }
    }
    return guarded([&] {
        *bytes = workspace_size(index, problem, sm_count);
        return W4A16_OK;
    });
}

w4a16_status w4a16_run(int32_t tactic, const w4a16_args *args, void *stream) {
    return w4a16::run(tactic, args, {}, static_cast<CUstream_st *>(stream));
}

w4a16_status w4a16_run_named(const char *tactic, const w4a16_args *args, void *stream) {
    int32_t index = 0;
    if (const w4a16_status status = w4a16_find_tactic(tactic, &index); status != W4A16_OK) {
        return status;
    }
    return w4a16::run(index, args, {}, static_cast<CUstream_st *>(stream));
}
