// Rendered from templates/bundle/src/fusion_api.cpp; do not edit.

// The part of the C API that normalises activations, alone or before projections.

#include "decode/norm.h"
#include "extents.h"
#include "fusion/normalize_rows.h"
#include "fusion/split_columns.h"
#include "launch.h"
#include "tactics.h"

#include <algorithm>
#include <cmath>
#include <cstdio>

namespace w4a16 {
namespace {

constexpr std::size_t workspace_unit = 256;

std::size_t rounded(std::int64_t bytes) {
    return (static_cast<std::size_t>(bytes) + workspace_unit - 1) / workspace_unit * workspace_unit;
}

struct Segment {
    w4a16_problem problem;
    std::int32_t tactic;
    std::int64_t first_byte; // of its weights in b
};

// A call whose sizes were found to make sense, with its tactics chosen.
struct Call {
    Segment segments[most_segments];
    int count;
    bool splits;
    bool splits_at_once; // the product's own kernel does
    bool one_kernel;     // each product's own kernel normalises
    std::size_t rows_bytes;    // of the workspace: the normalised rows,
    std::size_t product_bytes; // a product that is yet to be split,
    std::size_t tactic_bytes;  // and what tactics want, one after the other
};

w4a16_status check_fusion_flags(std::uint32_t flags) {
    if ((flags & ~(W4A16_RUN_OVERLAP | W4A16_RUN_ONE_KERNEL)) != 0) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT,
            "flags is %u, expected W4A16_RUN_OVERLAP, W4A16_RUN_ONE_KERNEL, both, or 0", static_cast<unsigned>(flags));
    }
    return W4A16_OK;
}

w4a16_status check_norm(std::int32_t norm, std::int64_t m, std::int64_t x_stride, std::int64_t hidden, float eps,
    std::int64_t k) {
    if (norm != W4A16_NORM_LAYER && norm != W4A16_NORM_RMS) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "norm is %d, expected a w4a16_norm", static_cast<int>(norm));
    }
    if (const w4a16_status status = check_extent("m", m, 0); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_extent("k", k, 8, fusion::most_normalized_columns); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_multiple("k", k, 8); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_extent("hidden", hidden, 1, k); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_extent("x_stride", x_stride, hidden); status != W4A16_OK) {
        return status;
    }
    if (!(eps >= 0) || std::isinf(eps)) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "eps is %g, expected a finite number from 0 up",
            static_cast<double>(eps));
    }
    return W4A16_OK;
}

// Null pointers are right where `optional`.
w4a16_status check_named(const void *pointer, const char *name, int index, std::uintptr_t alignment, bool optional) {
    if (pointer == nullptr && optional) {
        return W4A16_OK;
    }
    char full[32];
    std::snprintf(full, sizeof full, index < 0 ? "%s" : "%s[%d]", name, index);
    return check_pointer(pointer, full, alignment);
}

w4a16_status check_norm_pointers(const void *x, const void *weight, const void *bias, const void *columns) {
    if (const w4a16_status status = check_pointer(x, "x", 2); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_named(weight, "ln_weight", -1, 2, true); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_named(bias, "ln_bias", -1, 2, true); status != W4A16_OK) {
        return status;
    }
    return check_named(columns, "columns", -1, 16, true);
}

// Whether the kernels that normalise by themselves can read the rows: in vectors, and in their own order.
bool reads_in_vectors(const w4a16_norm_qkv_args &args) {
    const auto vectored = [](const void *pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; };
    return args.columns == nullptr && args.hidden % 8 == 0 && args.x_stride % 8 == 0 && vectored(args.x)
        && vectored(args.ln_weight) && vectored(args.ln_bias);
}

// Has each product's own kernel normalise, if that was asked for.
w4a16_status choose_form(const w4a16_norm_qkv_args &args, Call &call) {
    if (args.m == 0 || (args.flags & W4A16_RUN_ONE_KERNEL) == 0) {
        return W4A16_OK;
    }
    call.one_kernel = reads_in_vectors(args);
    for (int i = 0; i < call.count && call.one_kernel; ++i) {
        Problem problem{};
        if (const w4a16_status status = check_problem(&call.segments[i].problem, problem); status != W4A16_OK) {
            return status;
        }
        call.one_kernel = args.tactic[i] != W4A16_AUTO
            ? normalizes(args.tactic[i], problem)
            : choose_normalizing(problem, sm_count_or_default(), call.segments[i].tactic);
    }
    if (!call.one_kernel) {
        return fail(W4A16_ERROR_UNSUPPORTED,
            "no kernel of these tactics normalises %lld rows of %lld, in this order and alignment, by itself",
            static_cast<long long>(args.m), static_cast<long long>(args.hidden));
    }
    return W4A16_OK;
}

w4a16_status prepare(const w4a16_norm_qkv_args *args, Call &call) {
    if (const w4a16_status status = check_input(args, "args"); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_fusion_flags(args->flags); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status
        = check_norm(args->norm, args->m, args->x_stride, args->hidden, args->eps, args->k);
        status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = count_segments(args->n, "n", call.count); status != W4A16_OK) {
        return status;
    }
    call.splits = args->split[0] != 0 || args->split[1] != 0 || args->split[2] != 0;
    if (call.splits) {
        int parts = 0;
        if (const w4a16_status status = count_segments(args->split, "split", parts); status != W4A16_OK) {
            return status;
        }
        const std::int64_t sum = args->split[0] + args->split[1] + args->split[2];
        if (call.count != 1 || sum != args->n[0]) {
            return fail(W4A16_ERROR_INVALID_ARGUMENT,
                "split is of %lld columns, but n is %lld, %lld, %lld: expected one segment with as many",
                static_cast<long long>(sum), static_cast<long long>(args->n[0]), static_cast<long long>(args->n[1]),
                static_cast<long long>(args->n[2]));
        }
    }
    std::int64_t columns = 0;
    for (int i = 0; i < call.count; ++i) {
        Segment &segment = call.segments[i];
        segment.problem.struct_size = sizeof segment.problem;
        segment.problem.quant_op = args->quant_op;
        segment.problem.m = args->m;
        segment.problem.n = args->n[i];
        segment.problem.k = args->k;
        segment.problem.group_size = args->group_size;
        segment.problem.has_bias = args->bias[i] != nullptr ? 1 : 0;
        segment.first_byte = columns * (args->k / 2);
        columns += args->n[i];
        segment.tactic = args->tactic[i];
        const w4a16_status status = args->tactic[i] == W4A16_AUTO
            ? w4a16_auto_tactic(&segment.problem, &segment.tactic)
            : w4a16_supports(args->tactic[i], &segment.problem);
        if (status != W4A16_OK) {
            return status;
        }
    }
    if (const w4a16_status status = choose_form(*args, call); status != W4A16_OK) {
        return status;
    }
    call.rows_bytes = call.one_kernel ? 0 : rounded(args->m * args->k * 2);
    call.splits_at_once = call.splits && splits_columns(call.segments[0].tactic);
    call.product_bytes = call.splits && !call.splits_at_once ? rounded(args->m * columns * 2) : 0;
    return W4A16_OK;
}

w4a16_status measure(Call &call) {
    call.tactic_bytes = 0;
    for (int i = 0; i < call.count; ++i) {
        std::size_t bytes = 0;
        const Segment &segment = call.segments[i];
        if (const w4a16_status status = w4a16_workspace_size(segment.tactic, &segment.problem, &bytes);
            status != W4A16_OK) {
            return status;
        }
        call.tactic_bytes = std::max(call.tactic_bytes, bytes);
    }
    return W4A16_OK;
}

w4a16_status check_pointers(const w4a16_norm_qkv_args &args, const Call &call) {
    if (const w4a16_status status = check_norm_pointers(args.x, args.ln_weight, args.ln_bias, args.columns);
        status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointer(args.b, "b", 16); status != W4A16_OK) {
        return status;
    }
    const bool zeros = args.quant_op == W4A16_GROUP_SCALE_ZERO;
    for (int i = 0; i < call.count; ++i) {
        const struct {
            const void *pointer;
            const char *name;
            bool optional;
        } pointers[] = {
            {args.scales[i], "scales", false}, {args.zeros[i], "zeros", !zeros}, {args.bias[i], "bias", true}};
        for (const auto &item : pointers) {
            if (const w4a16_status status = check_named(item.pointer, item.name, i, 16, item.optional);
                status != W4A16_OK) {
                return status;
            }
        }
        if (!zeros && args.zeros[i] != nullptr) {
            return fail(W4A16_ERROR_INVALID_ARGUMENT, "zeros[%d] is not NULL, but this problem has none", i);
        }
    }
    for (int i = 0; i < most_segments; ++i) {
        if ((call.splits ? args.split[i] : args.n[i]) > 0) {
            if (const w4a16_status status = check_named(args.c[i], "c", i, 16, false); status != W4A16_OK) {
                return status;
            }
        }
    }
    return args.workspace == nullptr ? W4A16_OK : check_pointer(args.workspace, "workspace", 16);
}

fusion::Normalization normalization_of(const w4a16_norm_qkv_args &args, void *out) {
    fusion::Normalization made{};
    made.x = static_cast<const std::uint16_t *>(args.x);
    made.m = static_cast<int>(args.m);
    made.x_stride = args.x_stride;
    made.hidden = static_cast<int>(args.hidden);
    made.weight = static_cast<const std::uint16_t *>(args.ln_weight);
    made.bias = static_cast<const std::uint16_t *>(args.ln_bias);
    made.columns = args.columns;
    made.k = static_cast<int>(args.k);
    made.out = static_cast<std::uint16_t *>(out);
    made.eps = args.eps;
    made.rms = args.norm == W4A16_NORM_RMS;
    made.overlap = (args.flags & W4A16_RUN_OVERLAP) != 0;
    return made;
}

// Of a split.
Outputs outputs_of(const w4a16_norm_qkv_args &args) {
    Outputs made{};
    std::int64_t end = 0;
    for (int i = 0; i < most_segments; ++i) {
        end += args.split[i];
        made.ends[i] = static_cast<int>(end);
        made.c[i] = args.c[i];
    }
    return made;
}

decode::Norm norm_of(const w4a16_norm_qkv_args &args) {
    decode::Norm made{};
    made.x = static_cast<const __half *>(args.x);
    made.x_stride = args.x_stride;
    made.weight = static_cast<const __half *>(args.ln_weight);
    made.bias = static_cast<const __half *>(args.ln_bias);
    made.hidden = static_cast<int>(args.hidden);
    made.eps = args.eps;
    made.rms = args.norm == W4A16_NORM_RMS;
    return made;
}

// From normalised rows, or with one kernel from x, to c, or with a split to `product`.  Weights were there before the
// call's first kernel started, so every launch after it may begin early.  What begins early writes to its workspace only
// when the launches before it are over, so one serves all of them.
w4a16_status project(const w4a16_norm_qkv_args &args, const Call &call, const void *rows, void *product,
    void *workspace, CUstream_st *stream) {
    for (int i = 0; i < call.count; ++i) {
        const Segment &segment = call.segments[i];
        w4a16_args run{};
        run.struct_size = sizeof run;
        run.flags = call.one_kernel && i == 0 ? args.flags & W4A16_RUN_OVERLAP : W4A16_RUN_OVERLAP;
        run.problem = &segment.problem;
        run.a = call.one_kernel ? nullptr : rows;
        run.b = static_cast<const unsigned char *>(args.b) + segment.first_byte;
        run.scales = args.scales[i];
        run.zeros = args.zeros[i];
        run.bias = args.bias[i];
        run.c = call.splits && !call.splits_at_once ? product : args.c[i];
        run.workspace = call.tactic_bytes > 0 ? workspace : nullptr;
        run.workspace_bytes = call.tactic_bytes;
        const Outputs parts = outputs_of(args);
        const decode::Norm norm = norm_of(args);
        Part part;
        part.outputs = call.splits_at_once ? &parts : nullptr;
        part.norm = call.one_kernel ? &norm : nullptr;
        part.follows_norm = !call.one_kernel && i == 0;
        const w4a16_status status = w4a16::run(segment.tactic, &run, part, stream);
        if (status != W4A16_OK) {
            return status;
        }
    }
    return W4A16_OK;
}

w4a16_status split(const w4a16_norm_qkv_args &args, const void *product, int sm_count, CUstream_st *stream) {
    fusion::Split made{};
    made.x = static_cast<const std::uint16_t *>(product);
    made.m = static_cast<int>(args.m);
    for (int i = 0; i < most_segments; ++i) {
        made.n[i] = static_cast<int>(args.split[i]);
        made.c[i] = static_cast<std::uint16_t *>(args.c[i]);
    }
    made.overlap = true;
    return launched([&] { fusion::split_columns(made, sm_count, stream); });
}

} // namespace
} // namespace w4a16

w4a16_status w4a16_norm_qkv_supports(const w4a16_norm_qkv_args *args) {
    w4a16::Call call{};
    return w4a16::prepare(args, call);
}

w4a16_status w4a16_norm_qkv_workspace(const w4a16_norm_qkv_args *args, size_t *bytes) {
    using namespace w4a16;
    Call call{};
    if (const w4a16_status status = prepare(args, call); status != W4A16_OK) {
        return status;
    }
    if (bytes == nullptr) {
        return fail(W4A16_ERROR_INVALID_ARGUMENT, "bytes is NULL");
    }
    if (args->m == 0) {
        *bytes = 0;
        return W4A16_OK;
    }
    if (const w4a16_status status = measure(call); status != W4A16_OK) {
        return status;
    }
    *bytes = call.rows_bytes + call.product_bytes + call.tactic_bytes;
    return W4A16_OK;
}

w4a16_status w4a16_norm_qkv(const w4a16_norm_qkv_args *args, void *given_stream) {
    using namespace w4a16;
    CUstream_st *const stream = static_cast<CUstream_st *>(given_stream);
    Call call{};
    if (const w4a16_status status = prepare(args, call); status != W4A16_OK) {
        return status;
    }
    if (args->m == 0) {
        return W4A16_OK;
    }
    if (const w4a16_status status = check_pointers(*args, call); status != W4A16_OK) {
        return status;
    }
    int sm_count = 0;
    if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = measure(call); status != W4A16_OK) {
        return status;
    }
    const std::size_t needed = call.rows_bytes + call.product_bytes + call.tactic_bytes;
    if (needed > 0 && (args->workspace == nullptr || args->workspace_bytes < needed)) {
        return fail(W4A16_ERROR_WORKSPACE, "workspace has %zu bytes, this call needs %zu",
            args->workspace == nullptr ? std::size_t{0} : args->workspace_bytes, needed);
    }
    unsigned char *const rows = static_cast<unsigned char *>(args->workspace);
    unsigned char *const product = rows + call.rows_bytes;
    unsigned char *const rest = product + call.product_bytes;
    if (!call.one_kernel) {
        const fusion::Normalization normalization = normalization_of(*args, rows);
        if (const w4a16_status status
            = launched([&] { fusion::normalize_rows(normalization, sm_count, stream); });
            status != W4A16_OK) {
            return status;
        }
    }
    if (const w4a16_status status = project(*args, call, rows, product, rest, stream); status != W4A16_OK) {
        return status;
    }
    return call.splits && !call.splits_at_once ? split(*args, product, sm_count, stream) : W4A16_OK;
}

w4a16_status w4a16_normalize_rows(int32_t norm, const void *x, int64_t m, int64_t x_stride, int64_t hidden,
    const void *ln_weight, const void *ln_bias, float eps, const int32_t *columns, int64_t k, void *out, uint32_t flags,
    void *stream) {
    using namespace w4a16;
    if (const w4a16_status status = check_flags(flags); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_norm(norm, m, x_stride, hidden, eps, k); status != W4A16_OK) {
        return status;
    }
    if (m == 0) {
        return W4A16_OK;
    }
    if (const w4a16_status status = check_norm_pointers(x, ln_weight, ln_bias, columns); status != W4A16_OK) {
        return status;
    }
    const std::int64_t x_bytes = ((m - 1) * x_stride + hidden) * 2;
    if (const w4a16_status status = check_buffers(x, "x", x_bytes, out, "out", m * k * 2); status != W4A16_OK) {
        return status;
    }
    if (const w4a16_status status = check_pointer(out, "out", 16); status != W4A16_OK) {
        return status;
    }
    int sm_count = 0;
    if (const w4a16_status status = check_current_device(sm_count); status != W4A16_OK) {
        return status;
    }
    w4a16_norm_qkv_args args{};
    args.flags = flags;
    args.norm = norm;
    args.m = m;
    args.x_stride = x_stride;
    args.hidden = hidden;
    args.k = k;
    args.eps = eps;
    args.x = x;
    args.ln_weight = ln_weight;
    args.ln_bias = ln_bias;
    args.columns = columns;
    const fusion::Normalization normalization = normalization_of(args, out);
    return launched(
        [&] { fusion::normalize_rows(normalization, sm_count, static_cast<CUstream_st *>(stream)); });
}
