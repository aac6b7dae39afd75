// Rendered from templates/bundle/src/tactics.h; do not edit.

// Tactics by index and name: what they can do, and which one to take (choose.cpp).

#pragma once

#include "kernels.h"

namespace w4a16 {

// A problem whose members were checked by themselves, in the types that kernels take.
struct Problem {
    w4a16_quant_op quant_op;
    int m;
    int n;
    int k;
    int group_size; // K for per column
    bool has_bias;
};

w4a16_status check_problem(const w4a16_problem *given, Problem &problem);

// All GEMM tactics in the order of their table, then "gemv" if there is one, then all decode tactics likewise.
int tactic_count();
int first_decode_tactic();
w4a16_status check_tactic(std::int32_t index);
bool is_gemv(std::int32_t index);
// Whether the tactic can write its columns to several arrays (Launch::outputs).
bool splits_columns(std::int32_t index);

// Whether the tactic has a kernel that normalises the problem's rows itself (Launch::norm).
bool normalizes(std::int32_t index, const Problem &problem);
// The best of those, if there is one.
bool choose_normalizing(const Problem &problem, int sm_count, std::int32_t &index);

w4a16_status supports(std::int32_t index, const Problem &problem);
// Without wording why not, which costs more than finding out.
bool gemv_supports_quietly(const Problem &problem);

// Never fails where any tactic supports the problem.
w4a16_status choose(const Problem &problem, int sm_count, std::int32_t &index);

// With a tactic that supports the problem.  Throws what the kernel's own host code refuses.
void launch_tactic(std::int32_t index, const Problem &problem, const Launch &launch);
bool needs_sm_count(std::int32_t index);
std::size_t workspace_size(std::int32_t index, const Problem &problem, int sm_count);

// What a product can be besides w4a16_run().
struct Part {
    const Outputs *outputs = nullptr;   // in place of args->c, for tactics that split columns
    const decode::Norm *norm = nullptr; // in place of args->a, for tactics that normalise
    bool follows_norm = false;          // Launch::follows_norm
};
w4a16_status run(std::int32_t tactic, const w4a16_args *args, const Part &part, CUstream_st *stream);

} // namespace w4a16
