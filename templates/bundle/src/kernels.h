// Rendered from templates/bundle/src/kernels.h; do not edit.

// The kernels that this library holds, as tables; kernels.cpp is rendered from the selection.

#pragma once

#include "w4a16.h"

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace w4a16 {

namespace decode {
struct Kernels; // decode/launch.h
struct Norm;    // decode/norm.h
} // namespace decode

// A product's columns as up to three arrays side by side; decode tactics alone can write more than one.
struct Outputs {
    void *c[3];
    int ends[3]; // of each one's columns: ascending up to N, and N for those that are not there
};

// One launch, checked.  `group_size` is K for per-column scales.
struct Launch {
    const void *a;
    const void *b;
    const void *scales;
    const void *zeros;
    const void *bias;
    void *c; // the only output, where that is all that the tactic knows
    Outputs outputs;
    int m;
    int n;
    int k;
    int group_size;
    void *workspace;
    std::size_t workspace_bytes;
    CUstream_st *stream;
    bool overlap; // W4A16_RUN_OVERLAP
    int sm_count;
    const decode::Norm *norm; // not null: the tactic's kernel normalises these rows, in place of a
    bool follows_norm;        // launched to overlap a short kernel, which lets it start at once
};

using LaunchFunction = void (*)(const Launch &launch);
using WorkspaceFunction = std::size_t (*)(int m, int n, int k, int sm_count);

constexpr int quant_op_count = 3;

// One tile and cluster shape, for each quant op that it was selected for.
struct GemmTactic {
    const char *name;
    const char *schedule;
    int tile[3]; // over (N, M, K)
    int cluster[3];
    bool uses_workspace;
    LaunchFunction launch[quant_op_count]; // by w4a16_quant_op; null: not in this build
    WorkspaceFunction workspace[quant_op_count];
};

// The GEMV kernels of one quant op, group size and bias.
struct GemvFamily {
    w4a16_quant_op quant_op;
    int group_size; // 0: per column
    bool bias;
    int columns_per_cta;
    std::uint64_t rows; // bit m set: there is a kernel for M = m
    LaunchFunction launch;
};

// One configuration of this project's kernels for few rows.
struct DecodeTactic {
    const char *name;
    const char *schedule;
    int cluster; // CTAs, which share K
    const decode::Kernels *kernels;
};

template <typename T>
struct Table {
    const T *first;
    int count;

    const T *begin() const { return first; }
    const T *end() const { return first + count; }
};

extern const Table<GemmTactic> gemm_tactics;
extern const Table<GemvFamily> gemv_families;
extern const Table<DecodeTactic> decode_tactics;

} // namespace w4a16
