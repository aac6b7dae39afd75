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

// Fitted to the times of all tactics on an H200 (benchmarks.shipped_table: 66 cases, 36 numbers of rows up to 8192).  In
// geometric mean what it takes needs 1.004 (M <= 8) to 1.029 times (M <= 512) the best tactic's time, in sample.
constexpr DecodeRule decode_rules[] = {
    {8, "decode:32x8:o2", 1},
    {8, "decode:224x8:g2", 1, 0, 0.5f},
    {8, "decode:48x8:o2", 1},
    {8, "decode:48x8:o2", 2, 0, 1.4f},
    {8, "decode:32x8:o2", 2},
    {8, "decode:224x8:g2", 0, 0, 1.4f},
    {8, "decode:112x8:o2:w6", 1, 4096},
    {8, "decode:32x8:o2", 4},
    {8, "decode:48x8:o2", 0},
    {16, "decode:64x16", 1, 0, 0.5f},
    {16, "decode:32x16:o2:w6", 1, 16384, 0.75f},
    {16, "decode:128x16:s1:o2:stream", 0, 0, 1},
    {16, "decode:128x16:s1:o2", 0, 4096, 0.25f},
    {16, "decode:32x8:o2", 0.75f, 8192},
    {16, "decode:80x16", 1, 8192},
    {16, "decode:48x8:o2", 0.5f},
    {16, "decode:64x16:s2:o2:c2", 0.5f},
    {16, "decode:128x16:s1:o2", 0},
    {32, "decode:64x32:s4", 1, 8192, 0.36f},
    {32, "decode:192x32:s1:stream", 0, 0, 0.75f},
    {32, "decode:64x32:s4:c2", 0.5f, 0, 0.25f},
    {32, "decode:64x32:s2:o2", 1.75f, 0, 1.4f},
    {32, "decode:128x32:s1:o2:stream", 0, 0, 0.25f},
    {32, "decode:32x8:o2", 0.25f},
    {32, "decode:32x8:o2", 0, 4096},
    {32, "decode:64x32:s4:c2", 0},
    {64, "decode:128x64:s1:stream", 0, 0, 0.5f},
    {64, "decode:64x64:s3:c2:k128", 0.5f, 0, 0.25f},
    {64, "decode:64x64:s3:k128", 0, 8192, 0.25f},
    {64, "decode:128x64:s1:stream", 0.31f, 0, 0.25f},
    {64, "decode:64x32:s4:c2", 0.25f},
    {64, "decode:128x64:s2:c2", 0},
    {96, "decode:128x128:s1:k128:stream", 0, 0, 0.5f},
    {96, "decode:128x128:s1:c2:k128", 0, 0, 0.36f},
    {96, "decode:64x32:s4:c2", 0.13f},
    {96, "decode:64x32:s4", 0.31f},
    {96, "decode:128x64:s2:c2", 0.25f},
    {96, "decode:128x32:s1:o2", 0, 8192},
    {96, "decode:128x128:s1:k128:stream", 0},
    {128, "decode:128x128:s1:k128:stream", 0, 0, 0.5f},
    {128, "decode:64x128:s2:k128", 0, 8192, 0.5f},
    {128, "decode:64x128:s2:c2:k128", 0.5f, 0, 0.36f},
    {128, "decode:128x128:s1:k128:stream", 0, 0, 0.25f},
    {128, "decode:64x32:s4:c2", 0.13f},
    {128, "decode:64x32:s2:o2", 0.25f, 4096},
    {128, "decode:64x64:s3:c2:k128", 0.25f},
    {128, "decode:64x64:s2:o2:k128", 0, 4096},
    {128, "decode:64x128:s2:c2:k128", 0},
    {192, "decode:192x64:s1:stream", 0, 0, 0.25f},
    {192, "decode:128x64:s1:stream", 0, 0, 0.25f},
    {192, "decode:64x64:s3:c2:k128", 0.13f},
    {192, "decode:64x64:s3:k128", 0.31f},
    {192, "decode:192x64:s1:stream", 0},
    {256, "decode:128x128:s1:k128:stream", 0, 0, 0.25f},
    {256, "decode:64x128:s2:k128", 0, 0, 0.25f},
    {256, "decode:64x64:s3:c2:k128", 0.13f},
    {256, "decode:64x64:s2:o2:k128", 0, 4096},
    {256, "decode:64x128:s2:c2:k128", 0},
    {384, "decode:192x128:s1:k128:stream", 0, 0, 0.25f},
    {384, "decode:128x128:s1:k128", 0.31f, 0, 0.25f},
    {384, "decode:64x128:s2:c2:k128", 0.13f},
    {384, "decode:64x128:s2:k128", 0.31f, 4096},
    {384, "decode:128x128:s1:k128:stream", 0},
    {512, "decode:128x128:s1:k128:stream", 0, 0, 0.25f},
    {512, "decode:64x128:s2:c2:k128", 0.13f},
    {512, "decode:128x128:s1:k128", 0, 4096},
    {512, "decode:128x128:s1:k128:stream", 0},
    {1024, "decode:128x128:s1:k128:stream", 0, 16384, 0.25f},
    {1024, "decode:64x128:s2:k128", 0.13f},
    {1024, "decode:128x128:s1:k128:stream", 0.25f},
    {1024, "decode:192x128:s1:k128:stream", 0},
    {2048, "decode:128x128:s1:k128:stream", 0, 8192},
    {2048, "decode:192x128:s1:k128:stream", 0, 16384},
    {2048, "decode:128x128:s1:k128", 0, 0, 0.36f},
    {2048, "decode:192x128:s1:k128:stream", 0},
    {8192, "decode:192x128:s1:k128:stream", 0},
};

} // namespace w4a16
