// SPDX-License-Identifier: Apache-2.0
// A decoy: the grouped kernels are not for us, and whoever includes this notices.
#error "grouped (MoE) kernels are not part of the miniature"
