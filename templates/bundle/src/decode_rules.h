// Rendered from templates/bundle/src/decode_rules.h; do not edit.

// Which decode tactic W4A16_AUTO takes, by M, N and K.

#pragma once

namespace w4a16 {

// The first line that holds, and that this build has, is taken.
struct DecodeRule {
    int m;             // for M up to this
    const char *name;  // of the tactic
    float tiles_an_sm; // for N that makes at most so many tiles for each SM; 0: any
    int k = 0;         // for K up to this; 0: any
    float above = 0;   // for N that makes more tiles for each SM than this
};

// Fitted to the times of all tactics on an H200 (benchmarks.shipped_table: 67 cases, 20 numbers of rows up to 384).  In
// geometric mean what it takes needs 1.004 (M <= 8) to 1.018 times (M <= 192) the best tactic's time, in sample.
constexpr DecodeRule decode_rules[] = {
    {8, "decode:32x8:o2", 1},
    {8, "decode:224x8:g2", 1, 0, 0.5f},
    {8, "decode:48x8:o2", 2, 4096},
    {8, "decode:32x8:o2", 2, 0, 1.4f},
    {8, "decode:48x8:o2", 1.65f, 16384},
    {8, "decode:112x8:o2:w6", 0, 4096},
    {8, "decode:224x8:g2", 0, 0, 0.5f},
    {8, "decode:32x8:o2", 0, 8192},
    {8, "decode:64x8", 0},
    {16, "decode:64x16", 1, 0, 0.5f},
    {16, "decode:32x16:o2:w6", 1, 16384, 0.75f},
    {16, "decode:224x16:g2", 1, 0, 0.5f},
    {16, "decode:128x16:s1:o2", 0, 4096, 0.25f},
    {16, "decode:32x8:o2", 0.75f, 8192},
    {16, "decode:80x16", 1, 8192},
    {16, "decode:48x8:o2", 0.5f},
    {16, "decode:64x16:s2:o2:c2", 0.5f},
    {16, "decode:128x16:s1:o2", 0.9f},
    {16, "decode:224x16:g2", 0},
    {32, "decode:64x32:s4", 1, 8192, 0.36f},
    {32, "decode:64x32:s2:o2", 3, 0, 1.4f},
    {32, "decode:64x32:s4:c2", 0.5f, 0, 0.25f},
    {32, "decode:128x32:s1:o2", 0, 0, 0.75f},
    {32, "decode:128x32:s2:c2", 0.5f, 0, 0.25f},
    {32, "decode:32x8:o2", 0.25f},
    {32, "decode:192x32:s1:c2", 0, 0, 0.25f},
    {32, "decode:32x8:o2", 0, 4096},
    {32, "decode:64x32:s4:c2", 0},
    {64, "decode:64x64:s3:c2:k128", 0.5f, 0, 0.25f},
    {64, "decode:64x64:s3:k128", 0.9f, 0, 0.25f},
    {64, "decode:192x64:s1:c2", 0.5f, 0, 0.36f},
    {64, "decode:256x64:s1", 0.9f, 0, 0.75f},
    {64, "decode:192x64:s1", 1.5f, 0, 0.75f},
    {64, "decode:64x64:s2:o2:k128", 1.75f, 0, 1},
    {64, "decode:128x64:s2:c2", 0.5f, 0, 0.25f},
    {64, "decode:64x32:s4:c2", 0.25f},
    {64, "decode:192x64:s1", 0.75f},
    {64, "decode:256x64:s1", 0},
    {96, "decode:128x128:s1:k128", 0, 0, 1.4f},
    {96, "decode:128x128:s1:c2:k128", 0.5f, 0, 0.36f},
    {96, "decode:192x128:s1:c2:k128", 0.5f, 0, 0.25f},
    {96, "decode:128x32:s1:o2", 0.31f, 0, 0.25f},
    {96, "decode:64x32:s4:c2", 0.13f},
    {96, "decode:192x128:s1:k128", 0, 0, 0.75f},
    {96, "decode:128x128:s1:k128", 0.9f, 0, 0.25f},
    {96, "decode:64x32:s2:o2", 0.5f, 4096},
    {96, "decode:64x32:s4", 0.31f},
    {96, "decode:128x64:s2:c2", 0.25f},
    {96, "decode:192x128:s1:k128", 0},
    {128, "decode:64x128:s2:k128", 1, 0, 0.5f},
    {128, "decode:64x128:s2:c2:k128", 0.5f, 0, 0.36f},
    {128, "decode:192x128:s1:c2:k128", 0.5f, 0, 0.25f},
    {128, "decode:128x128:s1:k128", 1.75f, 0, 1.4f},
    {128, "decode:192x128:s1:k128", 1.5f, 0, 0.75f},
    {128, "decode:128x128:s1:k128", 0.9f, 0, 0.25f},
    {128, "decode:64x32:s4:c2", 0.13f},
    {128, "decode:64x32:s2:o2", 0.25f, 4096},
    {128, "decode:192x128:s1:k128", 0.75f, 0, 0.25f},
    {128, "decode:64x128:s2:k128", 0, 0, 0.36f},
    {128, "decode:64x128:s2:c2:k128", 0},
    {192, "decode:192x64:s1", 0.36f, 0, 0.25f},
    {192, "decode:256x64:s1", 0.36f, 0, 0.25f},
    {192, "decode:256x64:s1", 0.75f, 0, 0.5f},
    {192, "decode:128x256:s1:k128", 1.75f, 0, 0.75f},
    {192, "decode:64x64:s3:c2:k128", 0.13f},
    {192, "decode:64x64:s2:o2:k128", 0.6f, 4096},
    {192, "decode:192x128:s1:k128", 1.5f, 0, 0.25f},
    {192, "decode:64x64:s3:k128", 0.31f},
    {192, "decode:192x64:s1:c2", 0.17f},
    {192, "decode:192x64:s1", 0, 4096},
    {192, "decode:64x64:s2:o2:k128", 0},
    {256, "decode:64x128:s2:k128", 0.5f, 0, 0.25f},
    {256, "decode:192x128:s1:k128", 0.5f, 0, 0.36f},
    {256, "decode:128x128:s1:k128", 0.5f, 0, 0.36f},
    {256, "decode:128x256:s1:k128", 1.75f, 0, 1.4f},
    {256, "decode:64x64:s3:c2:k128", 0.13f},
    {256, "decode:128x256:s1:k128", 0.9f, 0, 0.36f},
    {256, "decode:192x128:s1:k128", 1.5f, 0, 0.75f},
    {256, "decode:64x64:s2:o2:k128", 0.25f, 4096},
    {256, "decode:192x64:s1", 0.25f, 4096},
    {256, "decode:64x128:s2:c2:k128", 0.25f},
    {256, "decode:192x128:s1:c2:k128", 0},
    {384, "decode:128x128:s1:k128", 2.5f, 0, 0.5f},
    {384, "decode:192x128:s1:k128", 0, 0, 0.25f},
    {384, "decode:128x128:s1:k128", 0.31f, 0, 0.25f},
    {384, "decode:64x128:s2:c2:k128", 0.13f},
    {384, "decode:64x128:s2:k128", 0.31f, 4096},
    {384, "decode:128x128:s1:k128", 0.25f, 4096},
    {384, "decode:192x128:s1:k128", 0, 4096},
    {384, "decode:128x128:s1:c2:k128", 0.17f},
    {384, "decode:192x128:s1:c2:k128", 0},
};

} // namespace w4a16
