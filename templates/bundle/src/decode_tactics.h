// Rendered from templates/bundle/src/decode_tactics.h; do not edit.

// The tactics of this project's decode kernels: what they take, and how they are launched.

#pragma once

#include "tactics.h"

namespace w4a16 {

// Whether it has a kernel for the problem (M > 0), or why not.
w4a16_status decode_supports(const DecodeTactic &tactic, const Problem &problem);
// The same without wording why not, which costs more than finding out.
bool decode_supports_quietly(const DecodeTactic &tactic, const Problem &problem);

bool decode_uses_workspace(const DecodeTactic &tactic);
std::size_t decode_workspace(const DecodeTactic &tactic, const Problem &problem, int sm_count);

// Of W: how many columns a CTA computes.
int decode_rows(const DecodeTactic &tactic);

// Whether it has a kernel that normalises the problem's rows itself, and what that costs: how many columns of W the
// busiest SM could stream instead.  Negative: it has none.
std::int64_t decode_normalizing_cost(const DecodeTactic &tactic, const Problem &problem, int sm_count);

void describe_decode(const DecodeTactic &tactic, w4a16_tactic_info &info);

// Throws what the launch refuses.
void launch_decode(const DecodeTactic &tactic, const Launch &launch);

} // namespace w4a16
